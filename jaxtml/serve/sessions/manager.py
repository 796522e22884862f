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
    """One call's protocol: what happens, put into the call's outbox as its client reads it."""

    @property
    def scope(self) -> str:
        """The protocol's name."""
        ...

    def turned(self, turn: TickResult, words: Words) -> None:
        """A micro-turn was."""
        ...

    def leaving(self, in_s: float) -> None:
        """The session will be ended in so many seconds."""
        ...

    def ended(self, why: EndReason) -> None:
        """The session was ended; nothing comes after this."""
        ...


class Carrier(Protocol):
    """What carries a call at the moment."""

    def replace(self) -> None:
        """Another one carries it from now on."""
        ...


@dataclass
class ClientSession:
    """One session as its client has it. Use `SessionManager.admit`.

    Attributes:
      id: its public name.
      secret: whoever knows it may come back.
      expires_at: Unix time at which it has lasted as long as it may.
      span: of its trace.
      closing: when its client asked to close it, on the monotonic clock.
    """

    id: str
    secret: str
    grant: Grant
    session: ScheduledSession
    words: Reader
    expires_at: float
    span: tracing.Span
    speaks: SessionProtocol = field(init=False)
    outbox: ReplayBuffer = field(default_factory=ReplayBuffer)
    carried: Carrier | None = None
    closing: float | None = None
    warned: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)  # set at each micro-turn

    def carry(self, connection: Carrier) -> None:
        """The call goes on over this connection."""
        if self.carried is not None:
            self.carried.replace()
        self.carried = connection
        self.session.attach()

    def lost(self, connection: Carrier) -> None:
        """The connection is no more; the session stands still until there is another."""
        if self.carried is connection and not self.session.ended:
            self.carried = None
            self.session.detach()
            self.span.add_event("client gone")

    def close(self) -> None:
        """The client has nothing more to say: the session ends when what was begun is said."""
        self.closing = self.closing or time.monotonic()
        self.session.hearing.muted = True

    async def room(self) -> bool:
        """Waits until the session has room for sound; False where it has ended instead."""
        while not self.session.ended and not self.session.hearing.room():
            self.heard.clear()
            await self.heard.wait()
        return not self.session.ended


class SessionManager:
    """All calls of a server; one thread calls.

    Args:
      pool: where sessions live.
      access: who may have them.
      served: the model.
      limits: how long things may take.
      metrics: what is counted.
      prefix: of the names of its calls.
    """

    def __init__(
        self,
        pool: WorkerPool,
        access: Access,
        served: ServedModel,
        limits: Limits,
        metrics: Metrics,
        prefix: str = "sess_",
    ):
        self.pool, self.access, self.served, self.limits, self.metrics = pool, access, served, limits, metrics
        self.prefix = prefix
        self.calls: dict[str, ClientSession] = {}
        self.leaves_at: float | None = None  # when the server ends, on the monotonic clock; None: it does not
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, grant: Grant, make: Callable[[ClientSession], SessionProtocol], scope: str) -> ClientSession:
        """A call that begins at the next tick. Raises `Refused`."""
        self.ask(grant, scope)
        return self.begin(grant, make, scope)

    def ask(self, grant: Grant, scope: str) -> None:
        """Counts a request for a call, and looks whether one may begin. Raises as `admit`."""
        with self._refusing():
            self.check_open()
            self.access.ask(grant)
            self.access.check(grant, scope)
            self.pool.check()

    def begin(self, grant: Grant, make: Callable[[ClientSession], SessionProtocol], scope: str) -> ClientSession:
        """As `admit`, of a request that is counted already."""
        name = self.prefix + secrets.token_urlsafe(16)
        with self._refusing():
            self.check_open()
            self.pool.check()
            self.access.begin(grant, name, scope)
        session = self.pool.admit(secrets.randbits(31), self.limits.grace_s)
        reader = Reader(self.served.codec, self.served.config.duplex.control_base)
        expires_at = time.time() + min(self.limits.session_s, self.access.left_s(grant))
        span = tracing.session(name, scope, self.served.name, grant.key.name)
        try:
            call = ClientSession(name, secrets.token_urlsafe(24), grant, session, reader, expires_at, span)
            call.speaks = make(call)
        except BaseException:
            session.end(EndReason.FAILED)
            span.end()
            self.access.end(grant.key.name, name)
            raise
        self.calls[name] = call
        task = asyncio.create_task(self._run(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.metrics.begun.labels(scope).inc()
        log.event("session began", session=name, key=grant.key.name, protocol=scope)
        return call

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
        """A call of the same key. Raises `Refused`."""
        call = self.calls.get(name)
        if call is None or call.grant.key.name != grant.key.name:
            raise Refused(404, "session_not_found", f"there is no session {name[:64]}, or no longer")
        return call

    def resume(self, name: str, secret: str, after: int, grant: Grant) -> ClientSession:
        """The call that a client comes back to, having had all up to `after`. Raises `Refused`."""
        try:
            call = self.find(name, grant)
            if not hmac.compare_digest(call.secret.encode(), secret.encode()):
                raise Refused(403, "invalid_resume_token", "this token is not that session's")
            if not call.outbox.last - len(call.outbox.frames) <= after <= call.outbox.last:
                raise Refused(409, "resync_required", "what was missed is no longer there; begin a new session")
        except Refused as refused:
            self.metrics.resumed.labels(refused.code).inc()
            raise
        self.metrics.resumed.labels("resumed").inc()
        call.span.add_event("client back", {"after": after})
        log.event("session resumed", session=name, after=after)
        return call

    async def drain(self, within_s: float) -> None:
        """Admits nobody more, tells all that are there, and returns when they are gone; those left then are ended."""
        self.leaves_at = time.monotonic() + within_s
        for call in list(self.calls.values()):
            call.expires_at = min(call.expires_at, time.time() + within_s)
            call.warned = True
            call.speaks.leaving(within_s)
        while self.calls and time.monotonic() < self.leaves_at:
            await asyncio.sleep(0.05)
        await self.end(EndReason.DRAINED)

    async def end(self, why: EndReason) -> None:
        """Ends all calls and waits for their last words."""
        for call in list(self.calls.values()):
            call.session.end(why)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _run(self, call: ClientSession) -> None:
        """From the call's first micro-turn to its end."""
        why = EndReason.FAILED
        try:
            why = await self._followed(call)
        except Exception:
            logging.exception("session %s failed", call.id)
            call.session.end(why)
        finally:
            del self.calls[call.id]
            self.access.end(call.grant.key.name, call.id)
            call.speaks.ended(why)
            call.outbox.close()
            call.heard.set()
            self.metrics.ended.labels(why.value).inc()
            log.event("session ended", session=call.id, reason=why.value, micro_turns=call.session.turns)
            call.span.set_attribute("jaxtml.end", why.value)
            call.span.set_attribute("jaxtml.micro_turns", call.session.turns)
            call.span.end()

    async def _followed(self, call: ClientSession) -> EndReason:
        number = -1
        while turns := await call.session.turns_after(number):
            number = turns[-1].number
            for turn in turns:
                words = call.words.read(turn.tokens.tolist())
                call.speaks.turned(turn, words)
            call.heard.set()
            self.metrics.input_lag.observe(call.session.hearing.waiting / SAMPLE_RATE)
            self._consider(call, turns[-1])
        return call.session.ended or EndReason.FAILED

    def _consider(self, call: ClientSession, turn: TickResult) -> None:
        """Ends what has lasted long enough."""
        left_s = min(call.expires_at - time.time(), self.access.left_s(call.grant))  # others may use the same minutes
        if left_s <= 0:
            call.session.end(EndReason.EXPIRED if self.leaves_at is None else EndReason.DRAINED)
        elif left_s < min(_WARNED_S, self.limits.session_s / 2) and not call.warned:
            call.warned = True
            call.expires_at = min(call.expires_at, time.time() + left_s)  # what is told holds, also if others leave
            call.speaks.leaving(left_s)
        if call.closing is not None:
            waits = turn.speaking or call.session.typed or call.session.hearing.waiting
            if not waits or time.monotonic() > call.closing + self.limits.closing_s:
                call.session.end(EndReason.ASKED)
