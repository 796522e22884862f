"""What a session hears does not depend on who else is there, on its slot, or on the size of the batch."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.session import slots as slots_module
from jaxtml.session.engine import SlotInput, converse
from jaxtml.session.slots import SlotOutput, Slots, slot_groups
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control


@pytest.fixture(scope="module")
def bins(wave) -> list[np.ndarray]:
    return _bins(wave)


@pytest.fixture
def four(engine) -> Slots:
    """Four slots and no smaller bucket."""
    return Slots(engine, 4, ())


def _bins(wave: np.ndarray) -> list[np.ndarray]:
    stream, found = DmelStream(), []
    for turn in range(len(wave) // MICRO_TURN_SAMPLES):
        stream, frames = stream.step(wave[turn * MICRO_TURN_SAMPLES : (turn + 1) * MICRO_TURN_SAMPLES])
        found.append(frames)
    return found


def _noise(seed: int) -> SlotInput:
    return SlotInput(np.random.default_rng(seed).integers(0, 16, (4, 80)).astype(np.uint8))


def _alone(slots: Slots, bins: list[np.ndarray], seed: int = 7) -> list[SlotOutput]:
    slots.begin(0, seed, 0)
    gave = [slots.step({0: SlotInput(frames)})[0] for frames in bins]
    slots.end(0)
    return gave


def _same(one: list[SlotOutput], other: list[SlotOutput]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.wave, b.wave)
        assert (a.speaking, a.p_speak) == (b.speaking, b.p_speak)


def test_one_session_is_what_converse_gives(slots, engine, wave, bins):
    gave = _alone(slots, bins)
    assert {turn.speaking for turn in gave} == {True, False}, "nothing of interest is compared"
    for turn, (outputs, _) in zip(gave, converse(engine, [wave], seed=7), strict=True):
        np.testing.assert_array_equal(turn.wave, outputs.wave[0])
        np.testing.assert_array_equal(turn.tokens, outputs.tokens[0, : outputs.count[0]])


def test_neighbours_and_slots_change_no_bit(four, bins):
    expected = _alone(four, bins)
    for neighbour in (1, 2):
        four.begin(neighbour, seed=neighbour, week_ms=99)
    four.step({1: _noise(0), 2: _noise(1)})
    four.begin(0, seed=7, week_ms=0)
    assert four.live[0] == 2
    gave = []
    for turn, frames in enumerate(bins):
        if turn == 4:
            four.begin(3, seed=3, week_ms=5)
        if turn == 8:
            four.end(1)
        others = {session: _noise(10 * turn + session) for session in four.live if session}
        gave.append(four.step({**others, 0: SlotInput(frames)})[0])
    _same(expected, gave)


def test_moving_between_buckets_changes_no_token_and_hardly_the_sound(slots, bins):
    expected = _alone(slots, bins)
    slots.begin(0, seed=7, week_ms=0)
    gave, seen = [], set()
    for turn, frames in enumerate(bins):
        if turn in (2, 4, 6):
            slots.begin(turn, seed=turn, week_ms=0)
        if turn in (8, 9, 10):
            slots.end(2 * (turn - 7))
        seen.add(slots.bucket)
        others = {session: _noise(10 * turn + session) for session in slots.live if session}
        gave.append(slots.step({**others, 0: SlotInput(frames)})[0])
    assert seen == {1, 2, 4} and slots.bucket == 1
    slots.end(0)
    for a, b in zip(expected, gave, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.wave, b.wave, atol=1e-4)


def test_a_session_that_is_given_nothing_waits(slots, bins):
    expected = _alone(slots, bins)
    slots.begin(0, seed=7, week_ms=0)
    slots.begin(1, seed=1, week_ms=0)
    slots.begin(2, seed=1, week_ms=0)
    slots.end(2)  # two in a bucket of four
    slots.end(1)
    gave = []
    for frames in bins:
        slots.step({})
        gave.append(slots.step({0: SlotInput(frames)})[0])
    slots.end(0)
    _same(expected, gave)


def test_a_slot_keeps_nothing_of_who_had_it(four, bins):
    expected = _alone(four, bins)
    four.begin(5, seed=5, week_ms=12345)
    for turn in range(6):
        four.step({5: _noise(turn)})
    four.end(5)
    _same(expected, _alone(four, bins))


def test_text_and_background_reach_the_session_they_are_for(slots, bins, codec):
    words = tuple(codec.encode("forty two"))[: slots.engine.config.duplex.max_typed - 1]
    quiet = _alone(slots, bins)

    def told(given: SlotInput) -> float:
        slots.begin(0, seed=7, week_ms=0)
        slots.begin(1, seed=7, week_ms=0)
        gave = slots.step({0: given, 1: SlotInput(bins[0])})
        slots.end(0)
        slots.end(1)
        assert gave[1].p_speak == pytest.approx(quiet[0].p_speak, rel=1e-4)
        return gave[0].p_speak

    typed, background = told(SlotInput(bins[0], words)), told(SlotInput(bins[0], words, Control.BACKGROUND))
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
    assert [group.buckets for group in groups] == [(2,), (2,), (2,)], "who comes and goes moves nobody"
    expected = _alone(groups[0], bins)
    before, gave = len(compilations), []
    for turn, frames in enumerate(bins):
        for seed, group in enumerate(groups):
            if turn == seed:  # the same number in each, at another time
                group.begin(0, 7 + seed, 0)
            if turn == 4:
                group.begin(1, 9, 0)
            if 0 in group.live:
                given = {session: _noise(turn + session) for session in group.live}
                told = group.step(given if seed else given | {0: SlotInput(frames)})
                gave += [told[0]] if not seed else []
    assert len(compilations) == before
    _same(expected, gave)


def test_there_is_no_room_for_more_than_was_said(slots, engine):
    for session in range(4):
        slots.begin(session, 0, 0)
    with pytest.raises(ValueError, match="cannot begin beside 4 of 4"):
        slots.begin(9, 0, 0)
    slots.end(3)
    with pytest.raises(ValueError, match="session 2 cannot begin"):
        slots.begin(2, 0, 0)
    for session in range(3):
        slots.end(session)
    with pytest.raises(InputError, match="room for one at least"):
        Slots(engine, 0)
