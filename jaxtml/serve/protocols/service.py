"""What a server offers to the routes of its protocols.

`serve.web.application` makes one `Service`. Each protocol's `routes` function takes it and returns the protocol's
addresses. Sessions over a WebSocket begin with `serve.protocols.websocket`, sessions over WebRTC with
`serve.protocols.signalling`; both end up in `Service.run_session`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from jaxtml.serve.monitoring import log
from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Access, Grant
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.manager import SessionManager
from jaxtml.serve.transport.connection import MESSAGE_BYTES, Connection
from jaxtml.serve.transport.endings import ENDS_SESSION, ConnectionEnd

# A proxy may have removed the beginning of the path that the browser asked for. The middleware stores this beginning in
# the request under this key.
PUBLIC_PREFIX = web.RequestKey("public_prefix", str)

# Browsers cannot set headers of a WebSocket, so they send the key as a subprotocol with this prefix.
_KEY_SUBPROTOCOL = "openai-insecure-api-key."
_LOGGED_PATH = 200  # characters of a path in the log
_CLEANUP_S = 5.0  # for background tasks to end after they are cancelled

# Code with which a WebSocket is closed, by the reason for which its session ended (RFC 6455, section 7.4).
_CLOSE_CODES = {
    EndReason.ASKED: 1000,
    EndReason.EXPIRED: 1000,
    EndReason.LEFT: 1000,
    EndReason.DRAINED: 1012,  # service restart: the client may connect again
    EndReason.GONE: 1001,
    EndReason.INVALID: 1002,
    EndReason.SLOW: 1008,
    EndReason.FAILED: 1011,
}


class Service:
    """The sessions, keys and model of one server, and what the routes of all protocols do with them.

    Args:
      manager: admits and finds sessions.
      access: the keys and what they allow.
      model: the model that is served.
      metrics: counts errors and connections.
    """

    def __init__(self, manager: SessionManager, access: Access, model: ServedModel, metrics: Metrics):
        self.manager, self.access, self.model, self.metrics = manager, access, model, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def authorise(self, request: web.Request) -> Grant:
        """Returns what the key of a request allows.

        The key comes as a bearer token, in the header `api-key` (Azure's clients), as a WebSocket subprotocol
        (browsers), or as the query parameter `auth_id` (Moshi's clients have no other place for it).

        Raises:
          Refused: there is no key, or the server does not know it.
        """
        authorization = request.headers.get("Authorization", "")
        token = authorization[7:].strip() if authorization[:7].lower() == "bearer " else None
        token = token or request.headers.get("api-key") or request.query.get("auth_id")
        for subprotocol in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
            if subprotocol.strip().startswith(_KEY_SUBPROTOCOL):
                token = subprotocol.strip().removeprefix(_KEY_SUBPROTOCOL)
        return self.access.authenticate(token)

    def check_model(self, name: str | None) -> None:
        """Checks the model that a client asks for; None: the client asks for no particular one.

        Raises:
          Refused: this server has another model.
        """
        if name is not None and not self.model.is_called(name):
            raise Refused(404, "model_not_found", self.model.refuse(name))

    def count_refusal(self, refused: Refused, request: web.Request) -> None:
        """Counts a refusal: of an HTTP request, or of the first message on its WebSocket.

        Also logs the refusal if the request comes from a web page, asks for a WebSocket or is a POST. Other GET
        requests come from probes, which ask again and again.
        """
        self.metrics.rejections.labels(refused.code).inc()
        if "Origin" in request.headers or "Upgrade" in request.headers or request.method == "POST":
            self.log_refusal(refused.code, str(refused), request)

    def log_refusal(self, code: str, reason: str, request: web.Request) -> None:
        """Logs why a request, or the first message on its WebSocket, is refused."""
        log.event(
            "refused",
            code=code,
            reason=reason,
            method=request.method,
            path=request.path[:_LOGGED_PATH],  # without the query, which may contain a key
            upgrade="Upgrade" in request.headers,
        )

    async def hang_up(self, request: web.Request) -> web.Response:
        """Ends the session `{session}` of the request's path. The session may run over any transport."""
        self.manager.find(request.match_info["session"], self.authorise(request)).scheduled.end(EndReason.ASKED)
        return web.Response()

    async def run_session(self, connection: Connection, session: ClientSession, after: int = 0) -> None:
        """Carries a session over `connection` until the connection or the session ends, then closes the connection.

        `serve.transport.endings` says what the end of the connection means for the session.

        Args:
          connection: the client's connection.
          session: the session, new or resumed.
          after: number of the last frame that the client has received; 0: none.
        """
        session.attach(connection)
        end = ConnectionEnd.GONE
        try:
            end = await connection.run(session.replay_buffer, after, session.protocol.receive)
            if end is not ConnectionEnd.DONE:
                log.event("connection ended", session=session.id, how=end.name.lower(), code=connection.close_code)
            if connection.message_was_too_large:
                session.protocol.on_unreadable(message_too_large())
                await connection.send_last(session.replay_buffer)
            if end in ENDS_SESSION or not session.protocol.resumable:
                session.scheduled.end(ENDS_SESSION.get(end, EndReason.GONE))
        finally:
            session.detach(connection, away=end is ConnectionEnd.AWAY)
        await connection.close(*close_code(end, session, connection))

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` beyond the request that asks for it, at most until the server ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel_background_work(self) -> None:
        """Cancels what `run_in_background` has started, and waits a few seconds for its end."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLEANUP_S)


def public_path(request: web.Request) -> str:
    """Returns the path of a request as the client wrote it, also if a proxy has removed the beginning."""
    return request.get(PUBLIC_PREFIX, "") + request.path


def close_code(end: ConnectionEnd, session: ClientSession, connection: Connection) -> tuple[int, str]:
    """Returns the code and the reason with which a WebSocket of `session` is closed, after `end`."""
    if end is ConnectionEnd.REPLACED:
        return 1008, "another connection has taken over"
    if connection.message_was_too_large:
        return 1009, "message too large"
    reason = session.scheduled.end_reason
    return (1001, "") if reason is None else (_CLOSE_CODES[reason], reason.value)


def message_too_large() -> InvalidMessage:
    """Returns the error for a message of more than `MESSAGE_BYTES`."""
    limit = f"a message has at most {MESSAGE_BYTES // 2**20} MiB"
    return InvalidMessage("message_too_large", f"{limit}: send the sound in several messages, or a smaller picture")
