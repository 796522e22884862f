"""A session's record holds the times at which things were heard, written and said, and survives being written down."""

import json

import numpy as np
import pytest

from jaxtml.data.tasks.scenarios import sample_user_text
from jaxtml.evals import events
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE


def reply(gates: str, heard: dict[int, str] | None = None, text: dict[int, str] | None = None) -> Reply:
    """A reply whose voice is heard from 50 ms after each opening until 100 ms before the close. `gates`: one letter a
    micro-turn, S for speak."""
    wave = np.zeros(len(gates) * MICRO_TURN_SAMPLES, np.float32)
    for stretch in events.stretches_of(Reply(wave, _records(gates, {}, {}))):
        first, last = round((stretch.open_s + 0.05) * SAMPLE_RATE), round((stretch.close_s - 0.1) * SAMPLE_RATE)
        wave[first:last] = 0.1
    return Reply(wave, _records(gates, heard or {}, text or {}))


def _records(gates: str, heard: dict[int, str], text: dict[int, str]) -> tuple[MicroTurn, ...]:
    gate = {"S": "speak", ".": "listen"}
    return tuple(
        MicroTurn(200 * m, gate[g], 0.5, heard.get(m, ""), text.get(m, ""), "", 3.0) for m, g in enumerate(gates)
    )


def test_a_stretch_is_heard_one_micro_turn_after_its_first_gate():
    (stretch,) = events.stretches_of(reply("..SSS...", text={2: " it", 3: " is sev", 4: "en"}))
    assert (stretch.open_s, stretch.close_s) == (0.6, 1.2)
    assert stretch.first_s == pytest.approx(0.65, abs=0.006)
    assert stretch.last_s == pytest.approx(1.1, abs=0.006)
    assert stretch.text == "it is seven"


def test_the_voice_that_rings_out_after_the_gate_has_closed_is_still_the_stretchs():
    made = reply("..S.S...")
    made.wave[round(0.8 * SAMPLE_RATE) : round(0.85 * SAMPLE_RATE)] = 0.1
    made.wave[round(1.2 * SAMPLE_RATE) : round(1.3 * SAMPLE_RATE)] = 0.1
    first, second = events.stretches_of(made)
    assert first.last_s == pytest.approx(0.85, abs=0.006)
    assert second.last_s == pytest.approx(1.3, abs=0.006)


def test_an_open_gate_without_sound_is_a_stretch_that_nobody_hears():
    silent = reply("..SS")
    silent.wave[:] = 0.001  # -60 dBFS
    (stretch,) = events.stretches_of(silent)
    assert stretch.first_s is None and stretch.last_s is None


def test_a_gate_that_is_open_at_the_end_closes_with_the_session():
    (stretch,) = events.stretches_of(reply("...SS"))
    assert stretch.close_s == 1.2


def test_a_heard_word_is_there_when_its_last_piece_is():
    records = _records("....", {0: " three", 1: " sev", 2: "en nine"}, {})
    assert events.heard_words(records) == (
        events.Heard("three", 0.2),
        events.Heard("seven", 0.6),
        events.Heard("nine", 0.6),
    )


def talk() -> Conversation:
    """Two turns; the first with a pause of 0.5 s after "three"."""
    words = [("three", 0.5, 0.9), ("nine", 1.4, 1.7), ("one", 1.8, 2.1), ("hello", 4.0, 4.4)]
    n = 30 * MICRO_TURN_SAMPLES
    return Conversation(
        np.zeros(n, np.float32),
        np.zeros(n, np.float32),
        user_words=tuple(Word(*word) for word in words),
        scenario="hesitation distraction exchange",
        expected="three nine one | hello",
        user_end_s=(2.1, 4.4),
    )


def test_turns_carry_their_words_pauses_and_right_answers():
    first, second = events.turns_of(talk())
    assert [word.text for word in first.words] == ["three", "nine", "one"]
    assert (first.start_s, first.end_s, first.scene, first.intent) == (0.5, 2.1, "hesitation", "number")
    assert first.pauses == ((0.9, 1.4),)
    assert (second.expected, second.intent, second.scene, second.pauses) == ("hello", "greet", "exchange", ())


def test_a_record_is_the_same_after_a_trip_through_json():
    session = events.observe("a-0001", "human", "someone", talk(), reply("..SS" + "." * 26, heard={5: " three"}))
    session = events.understood_as(session, {0: "three"})
    assert events.from_json(json.loads(json.dumps(events.to_json(session)))) == session
    assert session.seconds == 6.0


def test_every_drawn_sentence_has_the_intent_that_it_was_drawn_for():
    rng = np.random.default_rng(0)
    for _ in range(500):
        intent, text = sample_user_text(rng)
        assert events.intent_of(text.split()) == intent, text


def test_the_sound_of_a_stretch_is_all_of_it():
    made = reply("..SSS...")
    (stretch,) = events.stretches_of(made)
    sound = events.sound_of(stretch, made.wave)
    assert len(sound) == 3 * MICRO_TURN_SAMPLES
    assert np.abs(sound).sum() == pytest.approx(np.abs(made.wave).sum())
