"""The session manager: admits sessions, lets clients resume them, and ends them.

One manager serves one server. It checks every admission against the keys (`serve.sessions.access`) and the free slots
(`serve.runtime.pool`), and follows each session from its first micro-turn to its end. It knows protocols only by their
contract (`serve.sessions.protocol`). Called by the routes of the protocols and by `serve.serving`, all in the thread of
the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from absl import logging

from jaxtml.serve.monitoring import log, tracing
from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.runtime.pool import WorkerPool
from jaxtml.serve.runtime.scheduler import EndReason, ServerFull, TickResult
from jaxtml.serve.sessions.access import Access, Grant
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import Refused
from jaxtml.serve.sessions.protocol import SessionProtocol
from jaxtml.stream.reading import Reader
from jaxtml.stream.timebase import SAMPLE_RATE

_WARNING_S = 60.0  # a client is told this long before its session expires
_LAST_MESSAGES_S = 5.0  # `end_all` waits this long for the last messages of the sessions

MakeProtocol = Callable[[ClientSession], SessionProtocol]


@dataclass(frozen=True)
class Limits:
    """Time limits of a server, in seconds.

    Attributes:
      session_s: longest duration of a session.
      grace_s: how long a session waits for a client that lost its connection.
      first_message_s: how long a new connection may take to say what it wants.
      closing_s: how long the model may finish speaking after the client asked to close the session.
    """

    session_s: float = 7200.0
    grace_s: float = 30.0
    first_message_s: float = 10.0
    closing_s: float = 10.0


class SessionManager:
    """All sessions of one server.

    Args:
      pool: the workers that run the sessions.
      access: the keys and what they allow.
      model: the model that is served.
      limits: time limits.
      metrics: counts admissions, resumptions and ends.
      prefix: beginning of every session id; a router finds a session's server by it.

    Attributes:
      sessions: the sessions by id.
      drain_deadline: monotonic time at which the server ends; None: the server is not draining.
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
        self.drain_deadline: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- admission

    def check_open(self) -> None:
        """Raises `Refused` if the server is draining."""
        if self.drain_deadline is not None:
            retry_after_s = max(1.0, self.drain_deadline - time.monotonic())
            raise Refused(
                503, "draining", "this server is about to end; ask again, another server may answer", retry_after_s
            )

    def count_request(self, grant: Grant, scope: str) -> None:
        """Counts a request for a session and checks that a session could begin now.

        Called before the server reads the rest of the request, so that a refused request costs little.

        Raises:
          Refused: the server drains or is full, or the key does not allow the session.
        """
        with self._refusing_when_full():
            self.check_open()
            self.access.count_request(grant)
            self.access.check_session(grant, scope, replaces=self._away_session(grant) is not None)
            self.pool.check_capacity()

    def admit(self, grant: Grant, make_protocol: MakeProtocol, scope: str) -> ClientSession:
        """Admits a session, which begins at the next tick. The caller has counted the request with `count_request`.

        Args:
          grant: what the client's key allows.
          make_protocol: makes the protocol of the new session. If it raises an error, the session ends, and the
            caller gets the error.
          scope: name of the protocol.

        Raises:
          Refused: as `count_request`.
        """
        session_id = self.prefix + secrets.token_urlsafe(16)
        with self._refusing_when_full():
            self.check_open()
            self.pool.check_capacity()
            away = self._away_session(grant)
            if away is not None and self.access.is_at_session_limit(grant):
                away.scheduled.end(EndReason.GONE)
                self.access.end_session(grant.key.name, away.id)
            self.access.begin_session(grant, session_id, scope)
        scheduled = self.pool.admit(secrets.randbits(31), self.limits.grace_s)
        reader = Reader(self.model.codec, self.model.config.duplex.control_base)
        expires_at = time.time() + min(self.limits.session_s, self.access.remaining_s(grant))
        span = tracing.start_session_span(session_id, scope, self.model.name, grant.key.name)
        try:
            resume_token = secrets.token_urlsafe(24)
            session = ClientSession(session_id, resume_token, grant, scheduled, reader, expires_at, span)
            session.protocol = make_protocol(session)
        except BaseException:
            scheduled.end(EndReason.FAILED)
            span.end()
            self.access.end_session(grant.key.name, session_id)
            raise
        self.sessions[session_id] = session
        task = asyncio.create_task(self._follow(session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.metrics.sessions_begun.labels(scope).inc()
        log.event("session began", session=session_id, key=grant.key.name, protocol=scope)
        return session

    def _away_session(self, grant: Grant) -> ClientSession | None:
        """Returns a session of a key whose client is away; None: there is none.

        `admit` ends this session if the key may have no more sessions. So a visitor who leaves the page and opens it
        again is not refused because of the old session.
        """
        for session in self.sessions.values():
            scheduled = session.scheduled
            if session.grant.key.name == grant.key.name and scheduled.away and not scheduled.end_reason:
                return session
        return None

    # --- clients that come back

    def find(self, session_id: str, grant: Grant) -> ClientSession:
        """Returns a session that was begun with the same key.

        Raises:
          Refused: there is no such session, or another key began it.
        """
        session = self.sessions.get(session_id)
        if session is None or session.grant.key.name != grant.key.name:
            raise Refused(404, "session_not_found", f"there is no session {session_id[:64]}; it may have ended")
        return session

    def resume(self, session_id: str, resume_token: str, after: int, grant: Grant) -> ClientSession:
        """Returns the session that a client continues.

        Args:
          session_id: id of the session.
          resume_token: the session's secret, from the client.
          after: number of the last frame that the client has received.
          grant: what the client's key allows.

        Raises:
          Refused: as `find`, or the token is wrong, or frames after `after` are no longer kept.
        """
        try:
            session = self.find(session_id, grant)
            if not hmac.compare_digest(session.resume_token.encode(), resume_token.encode()):
                raise Refused(403, "invalid_resume_token", "this is not the resume token of that session")
            frames = session.replay_buffer
            if not frames.last_number - len(frames.frames) <= after <= frames.last_number:
                text = f"message {after} was never sent, or later ones are no longer kept; begin a new session"
                raise Refused(409, "resync_required", text)
        except Refused as refused:
            self.metrics.resumptions.labels(refused.code).inc()
            raise
        self.metrics.resumptions.labels("resumed").inc()
        session.span.add_event("client back", {"after": after})
        log.event("session resumed", session=session_id, after=after)
        return session

    # --- the end

    async def drain(self, within_s: float) -> None:
        """Admits no more sessions and returns when all sessions are over.

        Every client is told that its session ends in `within_s` seconds. Sessions that are left then are ended.
        """
        self.drain_deadline = time.monotonic() + within_s
        for session in list(self.sessions.values()):
            session.expires_at = min(session.expires_at, time.time() + within_s)
            session.warned = True
            session.protocol.on_expiring(within_s)
        while self.sessions and time.monotonic() < self.drain_deadline:
            await asyncio.sleep(0.05)
        await self.end_all(EndReason.DRAINED)

    async def end_all(self, reason: EndReason) -> None:
        """Ends all sessions and waits until their last messages are written."""
        for session in list(self.sessions.values()):
            session.scheduled.end(reason)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LAST_MESSAGES_S)

    # --- one session

    async def _follow(self, session: ClientSession) -> None:
        """Passes a session's micro-turns to its protocol until the session ends, then cleans up."""
        reason = EndReason.FAILED
        try:
            reason = await self._pass_micro_turns(session)
        except Exception:
            logging.exception("session %s failed", session.id)
            session.scheduled.end(reason)
        finally:
            del self.sessions[session.id]
            self.access.end_session(session.grant.key.name, session.id)
            session.protocol.on_end(reason)
            session.replay_buffer.close()
            session.micro_turn_done.set()
            self.metrics.sessions_ended.labels(reason.value).inc()
            micro_turns = session.scheduled.micro_turns
            log.event("session ended", session=session.id, reason=reason.value, micro_turns=micro_turns)
            session.span.set_attribute("jaxtml.end", reason.value)
            session.span.set_attribute("jaxtml.micro_turns", micro_turns)
            session.span.end()

    async def _pass_micro_turns(self, session: ClientSession) -> EndReason:
        """Passes micro-turns to the protocol as they come. Returns why the session ended."""
        scheduled, number = session.scheduled, -1
        while results := await scheduled.results_after(number):
            number = results[-1].number
            for result in results:
                words = session.reader.read(result.tokens.tolist())
                session.protocol.on_micro_turn(result, words)
            session.micro_turn_done.set()
            self.metrics.input_lag.observe(scheduled.jitter_buffer.waiting_samples / SAMPLE_RATE)
            self._enforce_limits(session, results[-1])
        return scheduled.end_reason or EndReason.FAILED

    def _enforce_limits(self, session: ClientSession, last: TickResult) -> None:
        """Ends a session that has expired or is closed, and warns the client of a session that expires soon."""
        # Other sessions may use up the minutes of the same key, so the time that is left can change.
        left_s = min(session.expires_at - time.time(), self.access.remaining_s(session.grant))
        if left_s <= 0:
            session.scheduled.end(EndReason.EXPIRED if self.drain_deadline is None else EndReason.DRAINED)
        elif left_s < min(_WARNING_S, self.limits.session_s / 2) and not session.warned:
            session.warned = True
            # The announced time stays in force, even if other sessions of the key end meanwhile.
            session.expires_at = min(session.expires_at, time.time() + left_s)
            session.protocol.on_expiring(left_s)
        if session.closing_at is not None:
            scheduled = session.scheduled
            busy = last.speaking or scheduled.text_queue or scheduled.jitter_buffer.waiting_samples
            if not busy or time.monotonic() > session.closing_at + self.limits.closing_s:
                scheduled.end(EndReason.ASKED)

    @contextmanager
    def _refusing_when_full(self) -> Iterator[None]:
        """Turns `ServerFull` into `Refused`."""
        try:
            yield
        except ServerFull as full:
            raise Refused(503, "server_full", str(full), full.retry_after_s) from full
