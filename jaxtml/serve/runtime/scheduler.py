"""The sessions of a server and the clock that they share: a tick every 200 ms, whatever clients and network do.

Runs in the process that has the network; the model is in another one (`serve.runtime.worker`). A session here knows of
no protocol: sound, text and pictures go in at any time, and every tick that it takes part in adds a `TickResult` to its
journal, from which whoever speaks its protocol reads.

The rules. All attached sessions take part in every tick, with what has arrived (`serve.runtime.jitter_buffer`). A tick
that ends after the next should have begun is a miss, and the next begins at once; once a second behind, the clock is
set to now, and the ticks that were lost are counted. A session whose client is gone stands still until it comes back,
or for `grace_s` at most: it says nothing to nobody. A journal keeps 30 seconds of turns that its reader
(`serve.sessions.manager`) has not taken; a session whose turns nobody reads is ended, and nothing ever waits without
bound.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np

from jaxtml.serve.runtime.jitter_buffer import JitterBuffer
from jaxtml.serve.runtime.wire import SessionStart, Tick, TickReply
from jaxtml.session.engine import SlotInput
from jaxtml.stream.clock import WEEK_MS
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control

TICK_S = MICRO_TURN_MS / 1000
KEPT = 150  # turns of a journal
_LOST_S = 1.0  # behind which the clock is set anew


@dataclass(frozen=True)
class TickResult:
    """One micro-turn of a session: the input of `[t_ms, t_ms + 200)`; `wave` `[3200]` float32 at 16 kHz is to be heard
    in `[t_ms + 200, t_ms + 400)`; `tokens` `[n]` int32 as generated."""

    number: int
    t_ms: int
    wave: np.ndarray
    tokens: np.ndarray
    speaking: bool
    p_speak: float


class EndReason(StrEnum):
    """Why a session ended."""

    ASKED = "close_requested"
    EXPIRED = "expired"  # it was as long as sessions may be
    DRAINED = "drained"  # the server is to end
    LEFT = "remote_hangup"  # the client closed its connection, as one does who is done
    GONE = "connection_lost"  # the client did not come back
    SLOW = "slow_client"  # it does not take what it is sent
    FAILED = "internal_error"  # ours


class ServerFull(Exception):
    """There is no slot; one may be free in `retry_after_s`."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"all sessions are taken; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class TickModel(Protocol):
    """The worker, seen from here."""

    async def tick(self, tick: Tick) -> TickReply: ...


class TickClock(Protocol):
    def now(self) -> float: ...

    async def until(self, due: float) -> None: ...


class WallClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()

    async def until(self, due: float) -> None:
        await asyncio.sleep(max(0.0, due - self.now()))


class TextPiece(NamedTuple):
    """Text of one micro-turn: token ids behind their TYPED or BACKGROUND mark. `placed` is told when that began."""

    mark: Control
    tokens: tuple[int, ...]
    placed: Callable[[int], None] | None = None


@dataclass
class ScheduledSession:
    """One session. Its protocol gives it input, waits for results with `results_after`, and ends it."""

    number: int
    seed: int
    grace_s: float
    clock: TickClock
    jitter_buffer: JitterBuffer = field(default_factory=JitterBuffer)
    attached: bool = True
    end_reason: EndReason | None = None
    text_queue: deque[TextPiece] = field(default_factory=deque)
    waiting_tokens: int = 0  # tokens in `typed`
    patches: np.ndarray | None = None
    journal: deque[TickResult] = field(default_factory=deque)
    begun: bool = False
    micro_turns: int = 0
    detached_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def queue_text(
        self, mark: Control, tokens: Sequence[int], most: int, placed: Callable[[int], None] | None = None
    ) -> None:
        """Text for the next micro-turns, in pieces of at most `most` tokens behind their TYPED or BACKGROUND mark.

        `placed` gets the time, in ms from the session's beginning, of the micro-turn that has the last piece.
        """
        self.waiting_tokens += len(tokens)
        for at in range(0, len(tokens), most):
            last = at + most >= len(tokens)
            self.text_queue.append(TextPiece(mark, tuple(tokens[at : at + most]), placed if last else None))

    def set_patches(self, patches: np.ndarray) -> None:
        """`[P, 2, 40, 40, 3]` float32 for the next micro-turn, instead of what waited for it."""
        self.patches = patches

    async def results_after(self, number: int) -> list[TickResult]:
        """The turns behind `number`, at least one; none where the session has ended. Those up to it are forgotten.

        One reader at a time.
        """
        while True:
            while self.journal and self.journal[0].number <= number:
                self.journal.popleft()
            if self.journal or self.end_reason:
                return list(self.journal)
            self.changed.clear()
            await self.changed.wait()

    def detach(self) -> None:
        """Its client is gone; it stands still."""
        self.attached, self.detached_at = False, self.clock.now()

    def attach(self) -> None:
        """Its client is back."""
        self.attached = True

    def end(self, why: EndReason) -> None:
        """Its slot is free at the next tick."""
        self.end_reason = self.end_reason or why
        self.changed.set()

    def next_input(self) -> SlotInput:
        text = self.text_queue.popleft() if self.text_queue else TextPiece(Control.TYPED, ())
        self.waiting_tokens -= len(text.tokens)
        if text.placed is not None:
            text.placed(self.micro_turns * MICRO_TURN_MS)
        patches, self.patches = self.patches, None
        return SlotInput(self.jitter_buffer.pop_frames(), text.tokens, text.mark, patches)


@dataclass
class TickCounts:
    """What happened since the start."""

    ticks: int = 0
    misses: int = 0
    lost: int = 0
    compilations: int = 0


class Scheduler:
    """All sessions of one worker, or of one group of them.

    Args:
      model: the worker.
      capacity: sessions that it has room for; detached ones keep their slot.
      clock: of the ticks.
      on_tick: called after each tick with the seconds it took and the seconds of the compiled step inside it.
      week_ms: the wall clock of the week.
      group: of the worker's sessions.
    """

    def __init__(
        self,
        model: TickModel,
        capacity: int,
        clock: TickClock | None = None,
        on_tick: Callable[[float, float], None] = lambda tick_s, step_s: None,
        week_ms: Callable[[], int] = lambda: int(1000 * time.time()) % WEEK_MS,
        group: int = 0,
    ):
        self.model, self.capacity, self.clock, self.group = model, capacity, clock or WallClock(), group
        self.on_tick, self.week_ms = on_tick, week_ms
        self.sessions: dict[int, ScheduledSession] = {}
        self.counts = TickCounts()
        self.numbers = itertools.count(1)
        self.leaving: list[int] = []

    def admit(self, seed: int, grace_s: float = 30.0) -> ScheduledSession:
        """A session that begins at the next tick. Raises `ServerFull`."""
        if not self.free_slots():
            raise ServerFull(self.retry_after_s())
        session = ScheduledSession(next(self.numbers), seed, grace_s, self.clock)
        self.sessions[session.number] = session
        return session

    def retry_after_s(self) -> float:
        """When the first client that is gone will have been gone for too long; a guess where all are there."""
        detached = [one.detached_at + one.grace_s for one in self.sessions.values() if not one.attached]
        return max(1.0, min(detached, default=self.clock.now() + 5) - self.clock.now())

    def free_slots(self) -> int:
        """Slots that nobody has."""
        return self.capacity - len(self.sessions)

    async def run(self) -> None:
        """Ticks until it is cancelled, or the worker is gone (`ConnectionError`)."""
        due = self.clock.now() + TICK_S
        while True:
            await self.clock.until(due)
            began = self.clock.now()
            told = await self._tick()
            now = self.clock.now()
            if told is not None:
                self.counts.ticks += 1
                self.counts.compilations += told.compilations
                self.counts.misses += now > due + TICK_S
                self.on_tick(now - began, told.step_ms / 1000)
            due += TICK_S
            if now > due + _LOST_S:
                lost = int((now - due) / TICK_S)
                self.counts.lost += lost
                due += lost * TICK_S

    async def _tick(self) -> TickReply | None:
        """One micro-turn of all; None where there is nothing to do."""
        now = self.clock.now()
        for session in list(self.sessions.values()):
            if not session.attached and now > session.detached_at + session.grace_s:
                session.end(EndReason.GONE)
            if session.end_reason:
                del self.sessions[session.number]
                if session.begun:
                    self.leaving.append(session.number)
        there = [one for one in self.sessions.values() if one.attached]
        begin = tuple(SessionStart(one.number, one.seed, self.week_ms()) for one in there if not one.begun)
        end, self.leaving = tuple(self.leaving), []
        if not there and not end:
            return None
        told = await self.model.tick(Tick(begin, end, {one.number: one.next_input() for one in there}, self.group))
        for one in there:
            one.begun = True
            gave = told.outputs[one.number]
            one.journal.append(
                TickResult(
                    one.micro_turns,
                    one.micro_turns * MICRO_TURN_MS,
                    gave.wave,
                    gave.tokens,
                    gave.speaking,
                    gave.p_speak,
                )
            )
            one.micro_turns += 1
            one.changed.set()
            if len(one.journal) > KEPT:
                one.end(EndReason.SLOW)
        return told
