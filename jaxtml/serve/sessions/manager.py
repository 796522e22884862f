"""Who is talking to a server: admission, clients that come back, the end of sessions and of the server.

A `ClientSession` is one session as its client has it: what it is sent, and by what name and secret it is found again.
It lives in the hub's clock; connections come and go. Knows of no protocol's wire, see `serve.protocols.live.protocol`
and its siblings."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from absl import logging

from jaxtml.config import Config
from jaxtml.serve.monitoring import log, tracing
from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.runtime.pool import WorkerPool
from jaxtml.serve.runtime.scheduler import EndReason, ScheduledSession, ServerFull, TickResult
from jaxtml.serve.sessions.access import Access, Grant
from jaxtml.serve.sessions.errors import Refused
from jaxtml.serve.transport.replay_buffer import ReplayBuffer
from jaxtml.stream.reading import Reader, Words
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import SAMPLE_RATE

_WARNED_S = 60.0  # before a session has lasted as long as it may


@dataclass(frozen=True)
class Limits:
    """How long things may take.

    Attributes:
      session_s: a session.
      grace_s: a client that was cut off, until it is back.
      first_message_s: a new connection, until it says what it wants.
      closing_s: what was begun to be said, after the client has asked to close.
    """

    session_s: float = 7200.0
    grace_s: float = 30.0
    first_message_s: float = 10.0
    closing_s: float = 10.0


@dataclass(frozen=True)
class ServedModel:
    """What is served: the model's name, its config and its words."""

    name: str
    config: Config
    codec: TextCodec


class SessionProtocol(Protocol):
    """One session's protocol: what happens, put into the session's outbox as its client reads it."""

    @property
    def scope(self) -> str:
        """The protocol's name."""
        ...

    def on_micro_turn(self, turn: TickResult, words: Words) -> None:
        """A micro-turn was."""
        ...

    def on_expiring(self, in_s: float) -> None:
        """The session will be ended in so many seconds."""
        ...

    def on_end(self, why: EndReason) -> None:
        """The session was ended; nothing comes after this."""
        ...


class Carrier(Protocol):
    """What carries a session at the moment."""

    def replace(self) -> None:
        """Another one carries it from now on."""
        ...


@dataclass
class ClientSession:
    """One session as its client has it. Use `SessionManager.admit`.

    Attributes:
      id: its public name.
      resume_token: whoever knows it may come back.
      expires_at: Unix time at which it has lasted as long as it may.
      span: of its trace.
      closing_at: when its client asked to close it, on the monotonic clock.
    """

    id: str
    resume_token: str
    grant: Grant
    scheduled: ScheduledSession
    reader: Reader
    expires_at: float
    span: tracing.Span
    protocol: SessionProtocol = field(init=False)
    replay_buffer: ReplayBuffer = field(default_factory=ReplayBuffer)
    connection: Carrier | None = None
    closing_at: float | None = None
    warned: bool = False
    micro_turn_done: asyncio.Event = field(default_factory=asyncio.Event)  # set at each micro-turn

    def attach(self, connection: Carrier) -> None:
        """The session goes on over this connection."""
        if self.connection is not None:
            self.connection.replace()
        self.connection = connection
        self.scheduled.attach()

    def detach(self, connection: Carrier) -> None:
        """The connection is no more; the session stands still until there is another."""
        if self.connection is connection and not self.scheduled.end_reason:
            self.connection = None
            self.scheduled.detach()
            self.span.add_event("client gone")

    def close(self) -> None:
        """The client has nothing more to say: the session ends when what was begun is said."""
        self.closing_at = self.closing_at or time.monotonic()
        self.scheduled.jitter_buffer.muted = True

    async def wait_for_room(self) -> bool:
        """Waits until the session has room for sound; False where it has ended instead."""
        while not self.scheduled.end_reason and not self.scheduled.jitter_buffer.free_samples():
            self.micro_turn_done.clear()
            await self.micro_turn_done.wait()
        return not self.scheduled.end_reason


class SessionManager:
    """All sessions of a server; one thread calls.

    Args:
      pool: where sessions live.
      access: who may have them.
      model: the model that is served.
      limits: how long things may take.
      metrics: what is counted.
      prefix: of the names of its sessions.
    """

    def __init__(
        self,
        pool: WorkerPool,
        access: Access,
        model: ServedModel,
        limits: Limits,
        metrics: Metrics,
        prefix: str = "sess_",
    ):
        self.pool, self.access, self.model, self.limits, self.metrics = pool, access, model, limits, metrics
        self.prefix = prefix
        self.sessions: dict[str, ClientSession] = {}
        self.leaves_at: float | None = None  # when the server ends, on the monotonic clock; None: it does not
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, grant: Grant, make: Callable[[ClientSession], SessionProtocol], scope: str) -> ClientSession:
        """A session that begins at the next tick. Raises `Refused`."""
        self.ask(grant, scope)
        return self.begin(grant, make, scope)

    def ask(self, grant: Grant, scope: str) -> None:
        """Counts a request for a session, and looks whether one may begin. Raises as `admit`."""
        with self._refusing():
            self.check_open()
            self.access.count_request(grant)
            self.access.check_session(grant, scope)
            self.pool.check_capacity()

    def begin(self, grant: Grant, make: Callable[[ClientSession], SessionProtocol], scope: str) -> ClientSession:
        """As `admit`, of a request that is counted already."""
        name = self.prefix + secrets.token_urlsafe(16)
        with self._refusing():
            self.check_open()
            self.pool.check_capacity()
            self.access.begin_session(grant, name, scope)
        scheduled = self.pool.admit(secrets.randbits(31), self.limits.grace_s)
        reader = Reader(self.model.codec, self.model.config.duplex.control_base)
        expires_at = time.time() + min(self.limits.session_s, self.access.remaining_s(grant))
        span = tracing.start_session_span(name, scope, self.model.name, grant.key.name)
        try:
            session = ClientSession(name, secrets.token_urlsafe(24), grant, scheduled, reader, expires_at, span)
            session.protocol = make(session)
        except BaseException:
            scheduled.end(EndReason.FAILED)
            span.end()
            self.access.end_session(grant.key.name, name)
            raise
        self.sessions[name] = session
        task = asyncio.create_task(self._run(session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.metrics.sessions_begun.labels(scope).inc()
        log.event("session began", session=name, key=grant.key.name, protocol=scope)
        return session

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A full pool refuses."""
        try:
            yield
        except ServerFull as full:
            raise Refused(503, "server_full", str(full), full.retry_after_s) from full

    def check_open(self) -> None:
        """Raises `Refused` where the server is about to end."""
        if self.leaves_at is not None:
            after_s = max(1.0, self.leaves_at - time.monotonic())
            raise Refused(503, "draining", "this server is about to end; another one may be there", after_s)

    def find(self, name: str, grant: Grant) -> ClientSession:
        """A session of the same key. Raises `Refused`."""
        session = self.sessions.get(name)
        if session is None or session.grant.key.name != grant.key.name:
            raise Refused(404, "session_not_found", f"there is no session {name[:64]}, or no longer")
        return session

    def resume(self, name: str, secret: str, after: int, grant: Grant) -> ClientSession:
        """The session that a client comes back to, having had all up to `after`. Raises `Refused`."""
        try:
            session = self.find(name, grant)
            if not hmac.compare_digest(session.resume_token.encode(), secret.encode()):
                raise Refused(403, "invalid_resume_token", "this token is not that session's")
            if (
                not session.replay_buffer.last_number - len(session.replay_buffer.frames)
                <= after
                <= session.replay_buffer.last_number
            ):
                raise Refused(409, "resync_required", "what was missed is no longer there; begin a new session")
        except Refused as refused:
            self.metrics.resumptions.labels(refused.code).inc()
            raise
        self.metrics.resumptions.labels("resumed").inc()
        session.span.add_event("client back", {"after": after})
        log.event("session resumed", session=name, after=after)
        return session

    async def drain(self, within_s: float) -> None:
        """Admits nobody more, tells all that are there, and returns when they are gone; those left then are ended."""
        self.leaves_at = time.monotonic() + within_s
        for session in list(self.sessions.values()):
            session.expires_at = min(session.expires_at, time.time() + within_s)
            session.warned = True
            session.protocol.on_expiring(within_s)
        while self.sessions and time.monotonic() < self.leaves_at:
            await asyncio.sleep(0.05)
        await self.end(EndReason.DRAINED)

    async def end(self, why: EndReason) -> None:
        """Ends all sessions and waits for their last words."""
        for session in list(self.sessions.values()):
            session.scheduled.end(why)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _run(self, session: ClientSession) -> None:
        """From the session's first micro-turn to its end."""
        why = EndReason.FAILED
        try:
            why = await self._followed(session)
        except Exception:
            logging.exception("session %s failed", session.id)
            session.scheduled.end(why)
        finally:
            del self.sessions[session.id]
            self.access.end_session(session.grant.key.name, session.id)
            session.protocol.on_end(why)
            session.replay_buffer.close()
            session.micro_turn_done.set()
            self.metrics.sessions_ended.labels(why.value).inc()
            log.event("session ended", session=session.id, reason=why.value, micro_turns=session.scheduled.micro_turns)
            session.span.set_attribute("jaxtml.end", why.value)
            session.span.set_attribute("jaxtml.micro_turns", session.scheduled.micro_turns)
            session.span.end()

    async def _followed(self, session: ClientSession) -> EndReason:
        number = -1
        while turns := await session.scheduled.results_after(number):
            number = turns[-1].number
            for turn in turns:
                words = session.reader.read(turn.tokens.tolist())
                session.protocol.on_micro_turn(turn, words)
            session.micro_turn_done.set()
            self.metrics.input_lag.observe(session.scheduled.jitter_buffer.waiting_samples / SAMPLE_RATE)
            self._consider(session, turns[-1])
        return session.scheduled.end_reason or EndReason.FAILED

    def _consider(self, session: ClientSession, turn: TickResult) -> None:
        """Ends what has lasted long enough."""
        left_s = min(
            session.expires_at - time.time(), self.access.remaining_s(session.grant)
        )  # others may use the same minutes
        if left_s <= 0:
            session.scheduled.end(EndReason.EXPIRED if self.leaves_at is None else EndReason.DRAINED)
        elif left_s < min(_WARNED_S, self.limits.session_s / 2) and not session.warned:
            session.warned = True
            session.expires_at = min(
                session.expires_at, time.time() + left_s
            )  # what is told holds, also if others leave
            session.protocol.on_expiring(left_s)
        if session.closing_at is not None:
            waits = turn.speaking or session.scheduled.text_queue or session.scheduled.jitter_buffer.waiting_samples
            if not waits or time.monotonic() > session.closing_at + self.limits.closing_s:
                session.scheduled.end(EndReason.ASKED)
