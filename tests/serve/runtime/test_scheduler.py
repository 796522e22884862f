"""Sessions on a shared clock: what they hear and say does not depend on it, and nothing waits without bound."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from jaxtml.serve.runtime.scheduler import MAX_JOURNAL, EndReason, ScheduledSession, Scheduler, ServerFull, TickResult
from jaxtml.session.converse import converse
from jaxtml.session.slots import Slots
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control
from tests.serve.stepped import InProcessWorker, SteppedClock

PACKET = MICRO_TURN_SAMPLES // 10


def hubbed(
    slots: Slots, test: Callable[[Scheduler, SteppedClock, InProcessWorker], Awaitable[None]], **options: Any
) -> None:
    """Runs `test` beside a hub."""

    async def main() -> None:
        clock = SteppedClock()
        model = InProcessWorker(slots, clock)
        hub = Scheduler(model, slots.capacity, clock, week_ms=lambda: 0, **options)
        running = asyncio.create_task(hub.run())
        clock.running.append(running)
        try:
            await clock.advance(0)
            await test(hub, clock, model)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


async def _speak(clock: SteppedClock, session: ScheduledSession, wave: np.ndarray) -> None:
    """In real time, in packets of 20 ms."""
    for start in range(0, len(wave), MICRO_TURN_SAMPLES):
        for packet in range(start, start + MICRO_TURN_SAMPLES, PACKET):
            session.jitter_buffer.push(wave[packet : packet + PACKET])
        await clock.advance(1)


def _is_converse(engine, wave: np.ndarray, turns: list[TickResult]) -> None:
    for turn, (outputs, _) in zip(turns, converse(engine, [wave], seed=7), strict=True):
        np.testing.assert_array_equal(turn.wave, outputs.wave[0])
        np.testing.assert_array_equal(turn.tokens, outputs.tokens[0, : outputs.count[0]])
        assert turn.speaking == outputs.speaking[0] and turn.p_speak == pytest.approx(float(outputs.p_speak[0]))


def test_a_session_hears_and_says_what_converse_does(slots, engine, wave):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = hub.admit(seed=7)
        await _speak(clock, session, wave)
        turns = await session.results_after(-1)
        assert [turn.t_ms for turn in turns] == [200 * i for i in range(14)]
        _is_converse(engine, wave, turns)
        assert [turn.number for turn in await session.results_after(11)] == [12, 13]
        reading = asyncio.create_task(session.results_after(13))
        await clock.advance(1)
        assert [turn.number for turn in await reading] == [14]
        session.end(EndReason.ASKED)
        assert await session.results_after(14) == []
        await clock.advance(1)
        assert not hub.sessions and not slots.live
        assert model.ticks[-1].end == (session.number,)

    hubbed(slots, test)


def test_a_session_whose_client_is_gone_stands_still_and_goes_on_as_if_nothing_had_been(slots, engine, wave):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = hub.admit(seed=7)
        half = 5 * MICRO_TURN_SAMPLES
        await _speak(clock, session, wave[:half])
        session.detach()
        before = len(model.ticks)
        await clock.advance(140)
        assert len(model.ticks) == before, "nobody is there"
        session.attach()
        await _speak(clock, session, wave[half:])
        _is_converse(engine, wave, await session.results_after(-1))

    hubbed(slots, test)


def test_a_client_that_does_not_come_back_frees_its_slot(slots):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        sessions = [hub.admit(seed) for seed in range(4)]
        await clock.advance(2)
        with pytest.raises(ServerFull, match="all sessions are taken") as refused:
            hub.admit(9)
        assert refused.value.retry_after_s == pytest.approx(5)
        sessions[1].detach()
        await clock.advance(50)  # ten seconds
        with pytest.raises(ServerFull) as refused:
            hub.admit(9)
        assert refused.value.retry_after_s == pytest.approx(20)
        for _ in range(102):
            for session in sessions:
                session.journal.clear()  # as one does who reads it
            await clock.advance(1)
        assert sessions[1].end_reason == EndReason.GONE and len(slots.live) == 3
        assert hub.admit(9).number == 5
        await clock.advance(1)
        assert len(slots.live) == 4

    hubbed(slots, test)


def test_one_that_leaves_before_its_first_tick_was_never_there(slots):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        hub.admit(1).end(EndReason.GONE)
        hub.admit(2).detach()
        await clock.advance(200)
        assert not model.ticks and not hub.sessions

    hubbed(slots, test)


def test_a_late_tick_is_counted_and_the_next_ones_catch_up(slots, engine, wave):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = hub.admit(seed=7)
        await _speak(clock, session, wave[: 4 * MICRO_TURN_SAMPLES])
        model.takes_s = 0.5
        session.jitter_buffer.push(wave[4 * MICRO_TURN_SAMPLES : 5 * MICRO_TURN_SAMPLES])
        await clock.advance(1)
        assert hub.counts.misses == 1
        model.takes_s = 0.01
        session.jitter_buffer.push(wave[5 * MICRO_TURN_SAMPLES :])  # what came meanwhile
        await clock.advance(9)
        assert hub.counts.misses == 2, "the one that began late, and from then on all were in time"
        assert hub.counts.lost == 0
        _is_converse(engine, wave, await session.results_after(-1))

    hubbed(slots, test)


def test_more_than_a_second_behind_the_clock_is_set_anew(slots):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = hub.admit(seed=7)
        await clock.advance(1)
        model.takes_s = 3.1
        await clock.advance(1)
        model.takes_s = 0.0
        assert hub.counts.lost == 14
        await clock.advance(20)
        assert session.micro_turns == 2 + 20 - 14 and hub.counts.misses == 1

    hubbed(slots, test)


def test_a_client_that_takes_nothing_is_ended_before_it_takes_memory(slots):
    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        deaf, other = hub.admit(1), hub.admit(2)
        for _ in range(MAX_JOURNAL + 2):
            await clock.advance(1)
            other.journal.clear()
        assert deaf.end_reason == EndReason.SLOW and len(deaf.journal) == MAX_JOURNAL + 1
        assert not other.end_reason and list(hub.sessions) == [other.number]

    hubbed(slots, test)


def test_text_and_pictures_come_in_their_order_in_the_pieces_that_a_micro_turn_takes(slots, engine):
    most = engine.config.duplex.max_typed - 1

    async def test(hub: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = hub.admit(1)
        placed: list[int] = []
        session.queue_text(Control.TYPED, list(range(most + 1)), most, placed.append)
        session.queue_text(Control.BACKGROUND, [5], most)
        session.set_patches(np.zeros((1, 2, 40, 40, 3), np.float32))
        session.set_patches(np.ones((1, 2, 40, 40, 3), np.float32))
        await clock.advance(4)
        given = [tick.inputs[session.number] for tick in model.ticks]
        texts = [(one.mark, one.text) for one in given]
        assert texts[:3] == [
            (Control.TYPED, tuple(range(most))), (Control.TYPED, (most,)), (Control.BACKGROUND, (5,)),
        ]  # fmt: skip
        assert placed == [200], "its last piece is in the second micro-turn"
        assert texts[3][1] == () and given[0].patches is not None and given[0].patches.all()
        assert [one.patches for one in given[1:]] == [None] * 3

    hubbed(slots, test)
