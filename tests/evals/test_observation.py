"""A session's record has the times at which words were heard, written and said, and comes back from JSON."""

import dataclasses
import json

import numpy as np
import pytest
from tones import ToneBank

from jaxtml.data.talks import mix, timing
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.data.tasks.scenarios import sample_user_text
from jaxtml.evals import observation
from jaxtml.evals.record import HeardWord, from_json, to_json
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE


def reply(gates: str, heard: dict[int, str] | None = None, text: dict[int, str] | None = None) -> Reply:
    """A reply that is audible from 50 ms after each opening of the gate until 100 ms before its close. `gates` has one
    letter for each micro-turn, S for speak."""
    wave = np.zeros(len(gates) * MICRO_TURN_SAMPLES, np.float32)
    for stretch in observation.speech_stretches(Reply(wave, _micro_turns(gates, {}, {}))):
        first, last = round((stretch.open_s + 0.05) * SAMPLE_RATE), round((stretch.close_s - 0.1) * SAMPLE_RATE)
        wave[first:last] = 0.1
    return Reply(wave, _micro_turns(gates, heard or {}, text or {}))


def _micro_turns(gates: str, heard: dict[int, str], text: dict[int, str]) -> tuple[MicroTurn, ...]:
    gate = {"S": "speak", ".": "listen"}
    return tuple(
        MicroTurn(200 * m, gate[g], 0.5, heard.get(m, ""), text.get(m, ""), "", 3.0) for m, g in enumerate(gates)
    )


def test_a_stretch_is_heard_one_micro_turn_after_its_first_gate():
    (stretch,) = observation.speech_stretches(reply("..SSS...", text={2: " it", 3: " is sev", 4: "en"}))
    assert (stretch.open_s, stretch.close_s) == (0.6, 1.2)
    assert stretch.first_s == pytest.approx(0.65, abs=0.006)
    assert stretch.last_s == pytest.approx(1.1, abs=0.006)
    assert stretch.text == "it is seven"


def test_a_voice_that_rings_out_after_the_gate_has_closed_belongs_to_the_stretch():
    made = reply("..S.S...")
    made.wave[round(0.8 * SAMPLE_RATE) : round(0.85 * SAMPLE_RATE)] = 0.1
    made.wave[round(1.2 * SAMPLE_RATE) : round(1.3 * SAMPLE_RATE)] = 0.1
    first, second = observation.speech_stretches(made)
    assert first.last_s == pytest.approx(0.85, abs=0.006)
    assert second.last_s == pytest.approx(1.3, abs=0.006)


def test_an_open_gate_without_sound_is_a_stretch_that_is_never_audible():
    silent = reply("..SS")
    silent.wave[:] = 0.001  # -60 dBFS
    (stretch,) = observation.speech_stretches(silent)
    assert stretch.first_s is None and stretch.last_s is None


def test_a_gate_that_is_open_at_the_end_closes_with_the_session():
    (stretch,) = observation.speech_stretches(reply("...SS"))
    assert stretch.close_s == 1.2


def test_a_heard_word_has_the_time_of_its_last_piece():
    micro_turns = _micro_turns("....", {0: " three", 1: " sev", 2: "en nine"}, {})
    assert observation.heard_words(micro_turns) == (
        HeardWord("three", 0.2),
        HeardWord("seven", 0.6),
        HeardWord("nine", 0.6),
    )


def conversation() -> Conversation:
    """Two user turns; the first has a pause of 0.5 s after "three"."""
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


def test_user_turns_have_their_words_pauses_and_right_replies():
    first, second = observation.user_turns(conversation())
    assert [word.text for word in first.words] == ["three", "nine", "one"]
    assert (first.start_s, first.end_s, first.scene, first.intent) == (0.5, 2.1, "hesitation", "number")
    assert first.pauses == ((0.9, 1.4),)
    assert (second.expected, second.intent, second.scene, second.pauses) == ("hello", "greet", "exchange", ())


def test_a_record_is_the_same_after_json():
    session = observation.observe(
        "a-0001", "human", "someone", conversation(), reply("..SS" + "." * 26, heard={5: " three"})
    )
    session = session.with_transcripts({0: "three"})
    assert from_json(json.loads(json.dumps(to_json(session)))) == session
    assert session.seconds == 6.0


def test_every_drawn_sentence_has_the_intent_that_it_was_drawn_for():
    rng = np.random.default_rng(0)
    for _ in range(500):
        intent, text = sample_user_text(rng)
        assert observation.intent_of(text.split()) == intent, text


def test_the_sound_of_a_stretch_has_every_sample_of_the_stretch():
    made = reply("..SSS...")
    (stretch,) = observation.speech_stretches(made)
    sound = observation.stretch_sound(stretch, made.wave)
    assert len(sound) == 3 * MICRO_TURN_SAMPLES
    assert np.abs(sound).sum() == pytest.approx(np.abs(made.wave).sum())


def test_a_new_scenario_with_a_user_turn_is_observed(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Weights(ScenarioWeights):
        greeting: float = 1.0

    def greeting(rng, draft, user) -> bool:
        placed = timing.exchange(rng, draft, user)
        draft.scenarios[-1:] = ["greeting"] if placed else draft.scenarios[-1:]
        return placed

    monkeypatch.setitem(mix.SCENARIOS, "greeting", greeting)
    weights = Weights(exchange=0, hesitation=0, barge_in=0, distraction=0.2, silence=0, typed=0)
    conversation = mix.make_conversation(np.random.default_rng(0), Speakers.of(ToneBank.made()), weights)
    turns = observation.user_turns(conversation)
    assert turns and {turn.scene for turn in turns} == {"greeting"}
