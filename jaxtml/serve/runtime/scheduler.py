"""The scheduler: the sessions of one group in a worker, and the clock that they share, one tick every 200 ms.

The scheduler runs in the network process and asks the worker process (`serve.runtime.worker`) for each tick. A worker
may have several groups of sessions, each with a scheduler of its own (`serve.runtime.pool`). The scheduler knows
nothing of protocols. A protocol gives a session audio, text and pictures at any time. Every tick in which the session
takes part adds a `TickResult` to the session's journal. The session manager (`serve.sessions.manager`) reads the
journal for the protocol.

The rules, which the tests hold:

- Every attached session takes part in every tick, with the audio that has arrived (`serve.runtime.jitter_buffer`).
- A tick that ends after the next tick's start time is a deadline miss. The next tick then starts at once. If the clock
  is more than a second behind, it jumps forward to now, and the ticks in between are counted as lost.
- A session whose client is disconnected is paused until the client is back, for at most `grace_s`. It produces nothing.
- A client may announce that it will be back at once, as a page that reloads does. Its session then waits for at most
  `AWAY_S`, and ends earlier if a new session needs its slot.
- A journal holds 30 seconds of results. A session whose results nobody reads is ended, so that no queue grows without
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
from jaxtml.session.records import SlotInput, SlotOutput
from jaxtml.stream.clock import WEEK_MS
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control

TICK_S = MICRO_TURN_MS / 1000
MAX_JOURNAL = 150  # micro-turns: 30 s
AWAY_S = 10.0  # for which a session waits for a client that will be back at once; a page reloads in less
_MAX_BEHIND_S = 1.0  # a clock further behind than this jumps forward to now


@dataclass(frozen=True)
class TickResult:
    """What one micro-turn of a session produced.

    Attributes:
      number: index of the micro-turn in the session, from 0.
      t_ms: start of the micro-turn; its input is the audio of `[t_ms, t_ms + 200)`.
      wave: `[3200]` float32 at 16 kHz, to be played in `[t_ms + 200, t_ms + 400)`.
      tokens: `[n]` int32, in the order in which the model generated them.
      speaking: the model speaks.
      p_speak: the probability of speaking rather than listening, at the token with which the model decides.
    """

    number: int
    t_ms: int
    wave: np.ndarray
    tokens: np.ndarray
    speaking: bool
    p_speak: float


class EndReason(StrEnum):
    """Why a session ended."""

    ASKED = "close_requested"  # the client asked to close it
    EXPIRED = "expired"  # the session reached its maximum length
    DRAINED = "drained"  # the server shuts down
    LEFT = "remote_hangup"  # the client closed its connection on purpose
    INVALID = "invalid_message"  # the client sent what is no WebSocket message, or a message that is too large
    GONE = "connection_lost"  # the client's connection was lost and the client did not come back in time
    SLOW = "slow_client"  # the client does not take what the server sends
    FAILED = "internal_error"  # the server failed


class ServerFull(Exception):
    """All slots are taken.

    Attributes:
      retry_after_s: seconds after which a slot may be free.
    """

    def __init__(self, retry_after_s: float):
        super().__init__(f"all sessions are taken; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class TickModel(Protocol):
    """The worker, as the scheduler sees it."""

    async def tick(self, tick: Tick) -> TickReply:
        """Runs one tick. Raises `ConnectionError` if the worker is gone."""
        ...


class TickClock(Protocol):
    """The clock of the ticks. Tests replace it."""

    def now(self) -> float:
        """Returns the time in seconds, from an arbitrary start."""
        ...

    async def until(self, due: float) -> None:
        """Waits until the time `due`."""
        ...


class WallClock:
    """A `TickClock` of real time."""

    def now(self) -> float:
        return time.monotonic()

    async def until(self, due: float) -> None:
        await asyncio.sleep(max(0.0, due - self.now()))


class TextPiece(NamedTuple):
    """Text for one micro-turn.

    Attributes:
      mark: TYPED or BACKGROUND, the control token in front of the text.
      tokens: token ids.
      on_placed: called with the start of the micro-turn that takes the piece, in ms since the session began.
    """

    mark: Control
    tokens: tuple[int, ...]
    on_placed: Callable[[int], None] | None = None


class TextQueue:
    """Text that waits for its micro-turns.

    Attributes:
      pieces: the pieces, oldest first. Each micro-turn takes one piece.
      tokens: number of tokens in all pieces.
    """

    def __init__(self) -> None:
        self.pieces: deque[TextPiece] = deque()
        self.tokens = 0

    def add(
        self, mark: Control, tokens: Sequence[int], max_tokens: int, on_placed: Callable[[int], None] | None
    ) -> None:
        """Adds a text; arguments as in `ScheduledSession.queue_text`."""
        self.tokens += len(tokens)
        for start in range(0, len(tokens), max_tokens):
            is_last = start + max_tokens >= len(tokens)
            piece = tuple(tokens[start : start + max_tokens])
            self.pieces.append(TextPiece(mark, piece, on_placed if is_last else None))

    def pop(self) -> TextPiece:
        """Removes the oldest piece and returns it."""
        piece = self.pieces.popleft()
        self.tokens -= len(piece.tokens)
        return piece


@dataclass
class ScheduledSession:
    """One session, as the scheduler runs it. `Scheduler.admit` creates one.

    A protocol gives it input with `jitter_buffer.push`, `queue_text` and `set_patches`. The session manager reads its
    results with `results_after`. Anyone may end it.

    Attributes:
      number: the session's number in its scheduler.
      seed: seed of its sampling.
      grace_s: seconds for which it waits for a disconnected client.
      clock: the scheduler's clock.
      jitter_buffer: audio that waits for its micro-turn.
      attached: the client is connected. A session that is not attached is paused.
      end_reason: why it ended; None: it has not ended.
      typed: what the user types now. The model reads it before `other`.
      other: background text, and messages of an earlier conversation.
      patches: `[P, 2, 40, 40, 3]` float32, the picture for the next micro-turn; None: no picture.
      journal: results that nobody has read yet.
      begun: the worker has a slot for it.
      micro_turns: number of micro-turns that it has had.
      waits_until: when a session that is not attached ends, unless its client is back before. On `clock`.
      away: the client announced that it will be back at once. A new session may take the slot.
      changed: set when there is a new result or the session has ended.
    """

    number: int
    seed: int
    grace_s: float
    clock: TickClock
    jitter_buffer: JitterBuffer = field(default_factory=JitterBuffer)
    attached: bool = True
    end_reason: EndReason | None = None
    typed: TextQueue = field(default_factory=TextQueue)
    other: TextQueue = field(default_factory=TextQueue)
    patches: np.ndarray | None = None
    journal: deque[TickResult] = field(default_factory=deque)
    begun: bool = False
    micro_turns: int = 0
    waits_until: float = 0.0
    away: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def queue_text(
        self,
        mark: Control,
        tokens: Sequence[int],
        max_tokens: int,
        on_placed: Callable[[int], None] | None = None,
        in_order: bool = False,
    ) -> None:
        """Queues text for the next micro-turns.

        What the user types goes before all other text: the user must not wait until a model has read long instructions.

        Args:
          mark: TYPED or BACKGROUND.
          tokens: token ids, of any number.
          max_tokens: the most that one micro-turn takes. The text is cut into pieces of at most this size.
          on_placed: called with the start of the micro-turn that takes the last piece, in ms since the session began.
          in_order: as in `queue_of`.
        """
        self.queue_of(mark, in_order).add(mark, tokens, max_tokens, on_placed)

    def queue_of(self, mark: Control, in_order: bool = False) -> TextQueue:
        """Returns the queue for text of a kind.

        Args:
          mark: TYPED or BACKGROUND.
          in_order: the text is a message of an earlier conversation. The model reads these messages one after the
            other, after the background text that was queued before them.
        """
        return self.typed if mark is Control.TYPED and not in_order else self.other

    @property
    def text_queue(self) -> list[TextPiece]:
        """All pieces of text that wait, in the order in which the model reads them."""
        return [*self.typed.pieces, *self.other.pieces]

    def set_patches(self, patches: np.ndarray) -> None:
        """Sets the picture for the next micro-turn, `[P, 2, 40, 40, 3]` float32. Replaces a waiting picture."""
        self.patches = patches

    async def results_after(self, number: int) -> list[TickResult]:
        """Waits for results after micro-turn `number` and returns them; an empty list: the session has ended.

        Results up to `number` are dropped from the journal, so a session has one reader at a time.
        """
        while True:
            while self.journal and self.journal[0].number <= number:
                self.journal.popleft()
            if self.journal or self.end_reason:
                return list(self.journal)
            self.changed.clear()
            await self.changed.wait()

    def detach(self, away: bool = False) -> None:
        """Pauses the session: its client is disconnected.

        Args:
          away: the client announced that it will be back at once.
        """
        self.attached, self.away = False, away
        self.waits_until = self.clock.now() + (min(AWAY_S, self.grace_s) if away else self.grace_s)

    def attach(self) -> None:
        """Resumes the session: its client is connected again."""
        self.attached, self.away = True, False

    def end(self, reason: EndReason) -> None:
        """Ends the session. A new session may have its slot at once. On a second call the first reason is kept."""
        self.end_reason = self.end_reason or reason
        self.changed.set()

    def next_input(self) -> SlotInput:
        """Removes the input of one micro-turn from the queues and returns it."""
        queue = self.typed if self.typed.pieces else self.other
        text = queue.pop() if queue.pieces else TextPiece(Control.TYPED, ())
        if text.on_placed is not None:
            text.on_placed(self.micro_turns * MICRO_TURN_MS)
        patches, self.patches = self.patches, None
        return SlotInput(self.jitter_buffer.pop_frames(), text.tokens, text.mark, patches)

    def add_output(self, output: SlotOutput) -> None:
        """Adds the output of one micro-turn to the journal; ends the session if the journal is full."""
        self.begun = True
        t_ms = self.micro_turns * MICRO_TURN_MS
        self.journal.append(
            TickResult(self.micro_turns, t_ms, output.wave, output.tokens, output.speaking, output.p_speak)
        )
        self.micro_turns += 1
        self.changed.set()
        if len(self.journal) > MAX_JOURNAL:
            self.end(EndReason.SLOW)


@dataclass
class TickCounts:
    """Counts since the scheduler started.

    Attributes:
      ticks: ticks that ran.
      misses: ticks that ended after the next tick's start time.
      lost: ticks that were left out because the clock was too far behind.
      compilations: programs that the worker compiled in service; anything but 0 is a bug.
    """

    ticks: int = 0
    misses: int = 0
    lost: int = 0
    compilations: int = 0


class Scheduler:
    """The scheduler of one group of a worker's sessions.

    Args:
      model: the worker.
      capacity: number of slots. A session keeps its slot while its client is disconnected.
      clock: the clock of the ticks; None: real time.
      on_tick: called after each tick with the seconds it took, and the seconds that the worker needed inside it.
      week_ms: returns the wall-clock time since the beginning of the week, in ms.
      group: index of this scheduler's group among the worker's groups.
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
        self._next_number = itertools.count(1)
        self._ended: list[int] = []  # numbers of ended sessions, which the next tick ends in the worker

    def admit(self, seed: int, grace_s: float = 30.0) -> ScheduledSession:
        """Returns a new session, which begins at the next tick.

        If all slots are taken, the new session gets the slot of the session whose client is away the longest.

        Args:
          seed: seed of its sampling.
          grace_s: seconds for which it waits for a disconnected client.

        Raises:
          ServerFull: no slot is free.
        """
        if not self.free_slots():
            raise ServerFull(self.retry_after_s())
        # Sessions that have ended leave at the next tick, in which the worker ends sessions before it begins others.
        living = [session for session in self.sessions.values() if not session.end_reason]
        if len(living) == self.capacity:
            min((one for one in living if one.away), key=lambda one: one.waits_until).end(EndReason.GONE)
        session = ScheduledSession(next(self._next_number), seed, grace_s, self.clock)
        self.sessions[session.number] = session
        return session

    def retry_after_s(self) -> float:
        """Returns the seconds until the first paused session loses its slot, at least 1; 5 if no session is paused."""
        given_up_at = [session.waits_until for session in self.sessions.values() if not session.attached]
        return max(1.0, min(given_up_at, default=self.clock.now() + 5) - self.clock.now())

    def free_slots(self) -> int:
        """Returns the number of slots that a new session may have."""
        return self.capacity - sum(not (session.end_reason or session.away) for session in self.sessions.values())

    async def run(self) -> None:
        """Runs a tick every 200 ms until the task is cancelled.

        Raises:
          ConnectionError: the worker is gone.
        """
        due = self.clock.now() + TICK_S
        while True:
            await self.clock.until(due)
            started_at = self.clock.now()
            reply = await self._tick()
            now = self.clock.now()
            if reply is not None:
                self.counts.ticks += 1
                self.counts.compilations += reply.compilations
                self.counts.misses += now > due + TICK_S
                self.on_tick(now - started_at, reply.step_ms / 1000)
            due += TICK_S
            if now > due + _MAX_BEHIND_S:
                lost = int((now - due) / TICK_S)
                self.counts.lost += lost
                due += lost * TICK_S

    async def _tick(self) -> TickReply | None:
        """Runs one micro-turn of all attached sessions. Returns the worker's reply; None: there was nothing to do."""
        self._remove_ended()
        attached = [session for session in self.sessions.values() if session.attached]
        begin = tuple(
            SessionStart(session.number, session.seed, self.week_ms()) for session in attached if not session.begun
        )
        end, self._ended = tuple(self._ended), []
        if not attached and not end:
            return None
        inputs = {session.number: session.next_input() for session in attached}
        reply = await self.model.tick(Tick(begin, end, inputs, self.group))
        for session in attached:
            session.add_output(reply.outputs[session.number])
        return reply

    def _remove_ended(self) -> None:
        """Ends sessions whose client stayed away too long, and frees the slots of all sessions that have ended."""
        now = self.clock.now()
        for session in list(self.sessions.values()):
            if not session.attached and now > session.waits_until:
                session.end(EndReason.GONE)
            if session.end_reason:
                del self.sessions[session.number]
                if session.begun:
                    self._ended.append(session.number)
