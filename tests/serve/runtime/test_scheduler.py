"""Tests of the scheduler: its sessions give the results of `converse`, and no queue grows without bound.

`jaxtml.session.converse` runs a session over a whole wave, without a server.
"""

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


def scheduling(
    slots: Slots, test: Callable[[Scheduler, SteppedClock, InProcessWorker], Awaitable[None]], **options: Any
) -> None:
    """Runs `test` beside a scheduler; `options` go to the scheduler."""

    async def main() -> None:
        clock = SteppedClock()
        model = InProcessWorker(slots, clock)
        scheduler = Scheduler(model, slots.capacity, clock, week_ms=lambda: 0, **options)
        running = asyncio.create_task(scheduler.run())
        clock.running.append(running)
        try:
            await clock.advance(0)
            await test(scheduler, clock, model)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


async def _speak(clock: SteppedClock, session: ScheduledSession, wave: np.ndarray) -> None:
    """Sends the wave in packets of 20 ms, one micro-turn per tick."""
    for start in range(0, len(wave), MICRO_TURN_SAMPLES):
        for packet in range(start, start + MICRO_TURN_SAMPLES, PACKET):
            session.jitter_buffer.push(wave[packet : packet + PACKET])
        await clock.advance(1)


def _check_matches_converse(engine, wave: np.ndarray, results: list[TickResult]) -> None:
    """Checks that the results are those of `converse` over the wave."""
    for result, (outputs, _) in zip(results, converse(engine, [wave], seed=7), strict=True):
        np.testing.assert_array_equal(result.wave, outputs.wave[0])
        np.testing.assert_array_equal(result.tokens, outputs.tokens[0, : outputs.count[0]])
        assert result.speaking == outputs.speaking[0] and result.p_speak == pytest.approx(float(outputs.p_speak[0]))


def test_session_hears_and_says_what_converse_does(slots, engine, wave):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = scheduler.admit(seed=7)
        await _speak(clock, session, wave)
        results = await session.results_after(-1)
        assert [result.t_ms for result in results] == [200 * i for i in range(14)]
        _check_matches_converse(engine, wave, results)
        assert [result.number for result in await session.results_after(11)] == [12, 13]
        reading = asyncio.create_task(session.results_after(13))
        await clock.advance(1)
        assert [result.number for result in await reading] == [14]
        session.end(EndReason.ASKED)
        assert await session.results_after(14) == []
        await clock.advance(1)
        assert not scheduler.sessions and not slots.live
        assert model.ticks[-1].end == (session.number,)

    scheduling(slots, test)


def test_paused_session_continues_as_if_it_had_not_been_paused(slots, engine, wave):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = scheduler.admit(seed=7)
        half = 5 * MICRO_TURN_SAMPLES
        await _speak(clock, session, wave[:half])
        session.detach()
        before = len(model.ticks)
        await clock.advance(140)
        assert len(model.ticks) == before, "a paused session takes part in no tick"
        session.attach()
        await _speak(clock, session, wave[half:])
        _check_matches_converse(engine, wave, await session.results_after(-1))

    scheduling(slots, test)


def test_client_that_does_not_come_back_frees_its_slot(slots):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        sessions = [scheduler.admit(seed) for seed in range(4)]
        await clock.advance(2)
        with pytest.raises(ServerFull, match="all sessions are taken") as refused:
            scheduler.admit(9)
        assert refused.value.retry_after_s == pytest.approx(5)
        sessions[1].detach()
        await clock.advance(50)  # ten seconds
        with pytest.raises(ServerFull) as refused:
            scheduler.admit(9)
        assert refused.value.retry_after_s == pytest.approx(20)
        for _ in range(102):
            for session in sessions:
                session.journal.clear()  # as the reader of the results does
            await clock.advance(1)
        assert sessions[1].end_reason == EndReason.GONE and len(slots.live) == 3
        assert scheduler.admit(9).number == 5
        await clock.advance(1)
        assert len(slots.live) == 4

    scheduling(slots, test)


def test_slot_of_an_ended_session_and_of_one_that_is_away_goes_to_a_new_session_at_once(slots):
    """A session is away if its client announced that it will be back at once."""

    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        ended, first_away, away, _ = [scheduler.admit(seed) for seed in range(4)]
        await clock.advance(1)
        ended.end(EndReason.LEFT)
        assert scheduler.free_slots() == 1 and scheduler.admit(4).number == 5
        first_away.detach(away=True)
        await clock.advance(1)
        away.detach(away=True)
        assert scheduler.free_slots() == 2
        scheduler.admit(5)
        assert first_away.end_reason is EndReason.GONE and not away.end_reason, "the longest absence ends first"
        away.attach()
        with pytest.raises(ServerFull):
            scheduler.admit(6)
        await clock.advance(1)
        assert sorted(slots.live) == [3, 4, 5, 6]

    scheduling(slots, test)


def test_session_that_is_away_waits_ten_seconds(slots):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        patient, hasty = scheduler.admit(0), scheduler.admit(1, grace_s=2)
        patient.detach(away=True)
        hasty.detach(away=True)
        await clock.advance(12)
        assert hasty.end_reason is EndReason.GONE and not patient.end_reason, (
            "an away session waits no longer than its grace_s"
        )
        await clock.advance(40)
        assert patient.end_reason is EndReason.GONE

    scheduling(slots, test)


def test_session_that_ends_before_its_first_tick_never_reaches_the_model(slots):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        scheduler.admit(1).end(EndReason.GONE)
        scheduler.admit(2).detach()
        await clock.advance(200)
        assert not model.ticks and not scheduler.sessions

    scheduling(slots, test)


def test_late_tick_is_counted_and_the_next_ones_catch_up(slots, engine, wave):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = scheduler.admit(seed=7)
        await _speak(clock, session, wave[: 4 * MICRO_TURN_SAMPLES])
        model.takes_s = 0.5
        session.jitter_buffer.push(wave[4 * MICRO_TURN_SAMPLES : 5 * MICRO_TURN_SAMPLES])
        await clock.advance(1)
        assert scheduler.counts.misses == 1
        model.takes_s = 0.01
        session.jitter_buffer.push(wave[5 * MICRO_TURN_SAMPLES :])  # the audio that arrived meanwhile
        await clock.advance(9)
        assert scheduler.counts.misses == 2, "the next tick, which began late; all others were in time"
        assert scheduler.counts.lost == 0
        _check_matches_converse(engine, wave, await session.results_after(-1))

    scheduling(slots, test)


def test_clock_jumps_forward_if_it_is_over_a_second_behind(slots):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = scheduler.admit(seed=7)
        await clock.advance(1)
        model.takes_s = 3.1
        await clock.advance(1)
        model.takes_s = 0.0
        assert scheduler.counts.lost == 14
        await clock.advance(20)
        assert session.micro_turns == 2 + 20 - 14 and scheduler.counts.misses == 1

    scheduling(slots, test)


def test_session_whose_results_nobody_reads_is_ended(slots):
    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        unread, other = scheduler.admit(1), scheduler.admit(2)
        for _ in range(MAX_JOURNAL + 2):
            await clock.advance(1)
            other.journal.clear()
        assert unread.end_reason == EndReason.SLOW and len(unread.journal) == MAX_JOURNAL + 1
        assert not other.end_reason and list(scheduler.sessions) == [other.number]

    scheduling(slots, test)


def test_text_is_cut_into_pieces_in_order_and_the_latest_picture_is_taken(slots, engine):
    max_tokens = engine.config.duplex.max_typed - 1

    async def test(scheduler: Scheduler, clock: SteppedClock, model: InProcessWorker) -> None:
        session = scheduler.admit(1)
        placed: list[int] = []
        session.queue_text(Control.TYPED, list(range(max_tokens + 1)), max_tokens, placed.append)
        session.queue_text(Control.BACKGROUND, [5], max_tokens)
        session.set_patches(np.zeros((1, 2, 40, 40, 3), np.float32))
        session.set_patches(np.ones((1, 2, 40, 40, 3), np.float32))
        await clock.advance(4)
        inputs = [tick.inputs[session.number] for tick in model.ticks]
        texts = [(input.mark, input.text) for input in inputs]
        assert texts[:3] == [
            (Control.TYPED, tuple(range(max_tokens))), (Control.TYPED, (max_tokens,)), (Control.BACKGROUND, (5,)),
        ]  # fmt: skip
        assert placed == [200], "the last piece is in the second micro-turn"
        assert texts[3][1] == () and inputs[0].patches is not None and inputs[0].patches.all()
        assert [input.patches for input in inputs[1:]] == [None] * 3

    scheduling(slots, test)
