"""A session's output does not depend on other sessions or on its slot, and hardly on the size of the batch."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.session import slots as slots_module
from jaxtml.session.converse import converse
from jaxtml.session.records import SlotInput, SlotOutput
from jaxtml.session.slots import Slots, slot_groups
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control


@pytest.fixture(scope="module")
def bins(wave) -> list[np.ndarray]:
    """The dMel frames of the shared waveform, by micro-turn."""
    stream, found = DmelStream(), []
    for turn in range(len(wave) // MICRO_TURN_SAMPLES):
        stream, frames = stream.step(wave[turn * MICRO_TURN_SAMPLES : (turn + 1) * MICRO_TURN_SAMPLES])
        found.append(frames)
    return found


@pytest.fixture
def one_bucket(engine) -> Slots:
    """Four slots and no smaller bucket."""
    return Slots(engine, 4, ())


def noise(seed: int) -> SlotInput:
    return SlotInput(np.random.default_rng(seed).integers(0, 16, (4, 80)).astype(np.uint8))


def run_alone(slots: Slots, bins: list[np.ndarray], seed: int = 7) -> list[SlotOutput]:
    slots.begin(0, seed, 0)
    outputs = [slots.step({0: SlotInput(frames)})[0] for frames in bins]
    slots.end(0)
    return outputs


def assert_equal(expected: list[SlotOutput], outputs: list[SlotOutput]) -> None:
    for a, b in zip(expected, outputs, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.wave, b.wave)
        assert (a.speaking, a.p_speak) == (b.speaking, b.p_speak)


def test_one_session_gives_what_converse_gives(slots, engine, wave, bins):
    outputs = run_alone(slots, bins)
    assert {output.speaking for output in outputs} == {True, False}, (
        "the test needs a session in which the model speaks and listens"
    )
    for output, (expected, _) in zip(outputs, converse(engine, [wave], seed=7), strict=True):
        np.testing.assert_array_equal(output.wave, expected.wave[0])
        np.testing.assert_array_equal(output.tokens, expected.tokens[0, : expected.count[0]])


def test_neighbours_and_slots_change_no_bit(one_bucket, bins):
    slots = one_bucket
    expected = run_alone(slots, bins)
    for neighbour in (1, 2):
        slots.begin(neighbour, seed=neighbour, week_ms=99)
    slots.step({1: noise(0), 2: noise(1)})
    slots.begin(0, seed=7, week_ms=0)
    assert slots.live[0] == 2
    outputs = []
    for turn, frames in enumerate(bins):
        if turn == 4:
            slots.begin(3, seed=3, week_ms=5)
        if turn == 8:
            slots.end(1)
        others = {session: noise(10 * turn + session) for session in slots.live if session}
        outputs.append(slots.step({**others, 0: SlotInput(frames)})[0])
    assert_equal(expected, outputs)


def test_moving_between_buckets_changes_no_token_and_hardly_the_sound(slots, bins):
    expected = run_alone(slots, bins)
    slots.begin(0, seed=7, week_ms=0)
    outputs, buckets = [], set()
    for turn, frames in enumerate(bins):
        if turn in (2, 4, 6):
            slots.begin(turn, seed=turn, week_ms=0)
        if turn in (8, 9, 10):
            slots.end(2 * (turn - 7))
        buckets.add(slots.bucket)
        others = {session: noise(10 * turn + session) for session in slots.live if session}
        outputs.append(slots.step({**others, 0: SlotInput(frames)})[0])
    assert buckets == {1, 2, 4} and slots.bucket == 1
    slots.end(0)
    for a, b in zip(expected, outputs, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.wave, b.wave, atol=1e-4)


def test_a_session_without_input_stands_still(slots, bins):
    expected = run_alone(slots, bins)
    slots.begin(0, seed=7, week_ms=0)
    slots.begin(1, seed=1, week_ms=0)
    slots.begin(2, seed=1, week_ms=0)
    slots.end(2)  # two sessions in a bucket of four
    slots.end(1)
    outputs = []
    for frames in bins:
        slots.step({})
        outputs.append(slots.step({0: SlotInput(frames)})[0])
    slots.end(0)
    assert_equal(expected, outputs)


def test_a_slot_keeps_nothing_of_its_former_session(one_bucket, bins):
    expected = run_alone(one_bucket, bins)
    one_bucket.begin(5, seed=5, week_ms=12345)
    for turn in range(6):
        one_bucket.step({5: noise(turn)})
    one_bucket.end(5)
    assert_equal(expected, run_alone(one_bucket, bins))


def test_typed_and_background_text_reach_their_session_only(slots, bins, codec):
    words = tuple(codec.encode("forty two"))[: slots.engine.config.duplex.max_typed - 1]
    quiet = run_alone(slots, bins)

    def p_speak(slot_input: SlotInput) -> float:
        slots.begin(0, seed=7, week_ms=0)
        slots.begin(1, seed=7, week_ms=0)
        outputs = slots.step({0: slot_input, 1: SlotInput(bins[0])})
        slots.end(0)
        slots.end(1)
        assert outputs[1].p_speak == pytest.approx(quiet[0].p_speak, rel=1e-4)
        return outputs[0].p_speak

    typed, background = p_speak(SlotInput(bins[0], words)), p_speak(SlotInput(bins[0], words, Control.BACKGROUND))
    assert len({round(p, 6) for p in (quiet[0].p_speak, typed, background)}) == 3


def test_nothing_compiles_in_service(slots, bins, compilations):
    before = len(compilations)
    for session in range(4):
        slots.begin(session, session, 0)
        slots.step({session: SlotInput(bins[0]) for session in slots.live})
    for session in range(4):
        slots.end(session)
        slots.step({session: SlotInput(bins[1], (1, 2)) for session in slots.live})
    assert len(compilations) == before and not slots.live


def test_groups_share_their_programs_and_nothing_else(engine, bins, compilations, monkeypatch):
    monkeypatch.setattr(slots_module, "CPU_BATCH", 2)
    groups = slot_groups(engine, 5)
    assert [group.buckets for group in groups] == [(2,), (2,), (2,)], "with one bucket, sessions never move"
    expected = run_alone(groups[0], bins)
    before, outputs = len(compilations), []
    for turn, frames in enumerate(bins):
        for index, group in enumerate(groups):
            if turn == index:  # every group has a session 0, each begins at another time
                group.begin(0, 7 + index, 0)
            if turn == 4:
                group.begin(1, 9, 0)
            if 0 in group.live:
                inputs = {session: noise(turn + session) for session in group.live}
                stepped = group.step(inputs if index else inputs | {0: SlotInput(frames)})
                outputs += [] if index else [stepped[0]]
    assert len(compilations) == before
    assert_equal(expected, outputs)


def test_sessions_beyond_the_capacity_are_refused(slots, engine):
    for session in range(4):
        slots.begin(session, 0, 0)
    with pytest.raises(ValueError, match="session 9 cannot begin: all 4 slots are taken"):
        slots.begin(9, 0, 0)
    slots.end(3)
    with pytest.raises(ValueError, match="session 2 has begun already"):
        slots.begin(2, 0, 0)
    for session in range(3):
        slots.end(session)
    with pytest.raises(InputError, match="room for one session at least"):
        Slots(engine, 0)
