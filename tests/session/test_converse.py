"""Sessions over waveforms: replies keep time with their input, and later input changes no earlier output."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.session.converse import converse, replies
from jaxtml.session.records import Reply
from jaxtml.stream.clock import WEEK_MS
from jaxtml.stream.dmel import user_dmel
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, MICRO_TURN_SAMPLES

SLOTS = 4
LENGTHS = (20 * MICRO_TURN_SAMPLES, 7 * MICRO_TURN_SAMPLES + 123, 100, 0)


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in LENGTHS]


@pytest.fixture(scope="module")
def replied(engine, waves) -> list[Reply]:
    return replies(engine, waves, seed=1)


def test_a_reply_has_the_length_and_the_clock_of_its_wave(replied):
    for reply, length in zip(replied, LENGTHS, strict=True):
        assert reply.wave.shape == (length,) and reply.wave.dtype == np.float32
        assert len(reply.turns) == -(-length // MICRO_TURN_SAMPLES)
        assert [turn.t_ms for turn in reply.turns] == [200 * i for i in range(len(reply.turns))]


def test_the_output_of_a_micro_turn_is_heard_in_the_next(engine, waves, replied):
    reply = replied[0]
    assert not reply.wave[:MICRO_TURN_SAMPLES].any(), "there is output before the model has heard any input"
    gates = [turn.gate for turn in reply.turns]
    assert {"speak", "listen"} == set(gates)
    outputs = [outputs for outputs, _ in converse(engine, waves, seed=1)]
    for i, gate in enumerate(gates[:-1]):
        heard = reply.wave[(i + 1) * MICRO_TURN_SAMPLES : (i + 2) * MICRO_TURN_SAMPLES]
        np.testing.assert_array_equal(heard, outputs[i].wave[0])
        assert gate == "listen" or heard.any()


def test_later_input_does_not_change_earlier_output(engine, waves, replied):
    """The gate of micro-turn m is decided when the input of m is known, and the input of m + 1 is not."""
    changed = [wave.copy() for wave in waves]
    changed[0][10 * MICRO_TURN_SAMPLES :] *= -3
    other = replies(engine, changed, seed=1)[0]
    for a, b in zip(replied[0].turns[:10], other.turns[:10], strict=True):
        assert (a.gate, a.p_speak, a.heard, a.text) == (b.gate, b.p_speak, b.heard, b.text)
    np.testing.assert_array_equal(replied[0].wave[: 11 * MICRO_TURN_SAMPLES], other.wave[: 11 * MICRO_TURN_SAMPLES])
    assert [t.p_speak for t in replied[0].turns[10:]] != [t.p_speak for t in other.turns[10:]]


def test_a_conversation_hears_the_frames_that_training_hears(engine, step, waves, replied):
    """Runs the same session by hand, with the frames of the whole wave computed at once."""
    padded = [np.pad(wave, (0, LENGTHS[0] - len(wave))) for wave in waves]
    bins = np.stack([user_dmel(wave) for wave in padded]).reshape(SLOTS, -1, FRAMES_PER_MICRO_TURN, 80)
    state, inputs = engine.duplex.init_state(SLOTS, 1), engine.duplex.empty_inputs(SLOTS)
    reader = engine.reader()
    for turn, record in enumerate(replied[0].turns):
        state, out = step(engine.params, state, inputs._replace(bins=bins[:, turn]))
        assert record.p_speak == round(float(out.p_speak[0]), 4)
        words = reader.read(np.asarray(out.tokens[0, : out.count[0]]).tolist())
        assert (record.heard, record.text, record.delegate) == words[:3]


def test_the_wall_clock_at_the_start_changes_the_session(engine, waves, replied):
    later = [records[0].p_speak for _, records in converse(engine, waves, seed=1, week_ms=WEEK_MS // 3)]
    assert later != [turn.p_speak for turn in replied[0].turns]


def test_a_conversation_compiles_nothing_once_its_step_is_compiled(engine, waves, compilations):
    session = converse(engine, waves)
    next(session)
    before = len(compilations)
    for _ in session:
        pass
    assert len(compilations) == before
    assert engine.compiled_step(SLOTS) is engine.compiled_step(SLOTS)


def test_each_record_has_the_time_of_its_step(replied):
    assert all(0 < turn.step_ms < 60_000 for turn in replied[0].turns)


def test_typed_text_reaches_its_session_in_its_micro_turn_and_goes_on_in_the_next(engine):
    silence = [np.zeros(5 * MICRO_TURN_SAMPLES, np.float32)] * SLOTS
    long = " ".join(["forty two"] * engine.config.duplex.max_typed)
    quiet, typed = (
        [outputs for outputs, _ in converse(engine, silence, typed=texts)]
        for texts in (None, [(), [(2, long)], (), ()])
    )
    changed = np.array(
        [[a.p_speak[i] != b.p_speak[i] for i in range(SLOTS)] for a, b in zip(quiet, typed, strict=True)]
    )
    np.testing.assert_array_equal(changed, [[i == 1 and turn >= 2 for i in range(SLOTS)] for turn in range(5)])
    short = [outputs for outputs, _ in converse(engine, silence, typed=[(), [(2, "forty two")], (), ()])]
    assert short[3].p_speak[1] != typed[3].p_speak[1], "the rest of the long text comes with the next micro-turn"
