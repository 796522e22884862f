"""The addresses of GPT-Live.

| address | what |
|---|---|
| GET `/v1/live/sessions` | WebSocket of a session; its first message is `session.start` or `session.resume` |
| POST `/v1/live/sessions` | a session over WebRTC: its configuration and the client's offer, as JSON |
| GET `/v1/live/sessions/{session}/attach` | WebSocket of a sideband: watches and directs the session |
| POST `/v1/live/sessions/{session}/hangup` | ends the session |

The query may have `auth_id`, the key. A client that resumes may name its session in `session_id`: a router like that of
`launch/nginx.conf` then sends it to the right server. Any other parameter is refused.

Listed in `serve.protocols.registry`.
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web

from jaxtml.serve.protocols import signalling, websocket
from jaxtml.serve.protocols.live import configuration, events
from jaxtml.serve.protocols.live.messages import FIRST_MESSAGES, CreateSession, Resume, Start
from jaxtml.serve.protocols.live.protocol import SCOPE, LiveProtocol
from jaxtml.serve.protocols.live.sideband import Sideband
from jaxtml.serve.protocols.query import check_query
from jaxtml.serve.protocols.service import Service, close_code, message_too_large
from jaxtml.serve.sessions.access import Grant
from jaxtml.serve.sessions.client_session import ClientSession
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.json_errors import read_json
from jaxtml.serve.transport.connection import Connection
from jaxtml.serve.transport.sound import VoiceTrack

_FIRST_MESSAGE_TRIES = 8  # first messages that may be wrong before the server closes the connection
# Connections that may be open before their session begins. Each may hold a message of 22 MiB (`MESSAGE_BYTES`) of which
# nothing has been checked yet, so this bounds the memory that strangers to the server can take. A client needs such a
# connection for one round trip; further clients wait for a place.
_OPENING = 8
_ROUTED_BY = "session_id"  # query parameter
_SIDEBANDS = 4  # sidebands of one session
# Close codes of a WebSocket (RFC 6455, IANA registry).
_POLICY_VIOLATION, _MESSAGE_TOO_BIG, _TRY_AGAIN_LATER = 1008, 1009, 1013


def routes(service: Service) -> list[web.RouteDef]:
    """Returns the addresses of GPT-Live on a server."""
    handlers = _LiveHandlers(service)
    return [
        web.get("/v1/live/sessions", handlers.connect),
        web.post("/v1/live/sessions", handlers.create_over_webrtc),
        web.get("/v1/live/sessions/{session}/attach", handlers.attach_sideband),
        web.post("/v1/live/sessions/{session}/hangup", handlers.hang_up),
    ]


class _LiveHandlers:
    def __init__(self, service: Service):
        self.service, self.manager, self.metrics = service, service.manager, service.metrics
        self._opening = asyncio.Semaphore(_OPENING)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Runs a session over a WebSocket: a new session, or one that the client resumes."""
        grant = self.service.authorise(request)
        check_query(request, SCOPE, {_ROUTED_BY})
        await self._wait_to_open()
        try:
            response, connection = await websocket.open_connection(self.service, request, LiveProtocol.frame_kind)
            found = await self._find_session(request, connection, grant)
        finally:
            self._opening.release()
        if found is not None:
            session, after = found
            await self.service.run_session(connection, session, after)
        return response

    async def attach_sideband(self, request: web.Request) -> web.StreamResponse:
        """Runs a sideband of a session until the sideband or the session ends."""
        grant = self.service.authorise(request)
        check_query(request, SCOPE)
        session = self.manager.find(request.match_info["session"], grant)
        protocol = _live_protocol(session)
        if len(protocol.sidebands) >= _SIDEBANDS:
            text = f"this session has {_SIDEBANDS} sidebands already"
            raise Refused(429, "session_limit_exceeded", text, 5.0)
        self.service.access.count_request(grant)
        response, connection = await websocket.open_connection(self.service, request, LiveProtocol.frame_kind)
        sideband = Sideband(protocol.receive_from_sideband)
        protocol.sidebands.append(sideband)
        try:
            end = await connection.run(sideband.replay_buffer, 0, sideband.receive)
        finally:
            protocol.sidebands.remove(sideband)
        if connection.message_was_too_large:
            sideband.send(events.new_event("error", error=events.error_fields(message_too_large())))
            await connection.send_last(sideband.replay_buffer)
        await connection.close(*close_code(end, session, connection))
        return response

    async def create_over_webrtc(self, request: web.Request) -> web.Response:
        """Admits a session over WebRTC and answers the client's offer."""
        grant = self.service.authorise(request)
        check_query(request, SCOPE)
        self.manager.count_request(grant, SCOPE)
        body = await self._read_offer(request)

        def make_protocol(session: ClientSession, track: VoiceTrack) -> LiveProtocol:
            grace_s = self.manager.limits.grace_s
            return LiveProtocol(session, self.service.model, body.session, self.metrics, grace_s, track=track)

        session, answer = await signalling.answer_offer(
            self.service, request, grant, body.transport.sdp, make_protocol, SCOPE
        )
        created = {"session": {"id": session.id}, "transport": {"type": "webrtc", "sdp": answer}}
        return web.json_response(created, status=201)

    async def hang_up(self, request: web.Request) -> web.Response:
        """Ends a session."""
        check_query(request, SCOPE)
        return await self.service.hang_up(request)

    # --- the first message over a WebSocket

    async def _wait_to_open(self) -> None:
        """Takes one of the places for connections whose session has not begun. Raises `Refused` if none gets free."""
        try:
            async with asyncio.timeout(self.manager.limits.first_message_s):
                await self._opening.acquire()
        except TimeoutError:
            text = f"{_OPENING} connections are open that have not begun a session; try again"
            raise Refused(503, "server_full", text, self.manager.limits.first_message_s) from None

    async def _find_session(
        self, request: web.Request, connection: Connection, grant: Grant
    ) -> tuple[ClientSession, int] | None:
        """Returns what `_read_first_message` returns. Closes a connection whose first message does not come in time."""
        try:
            async with asyncio.timeout(self.manager.limits.first_message_s):
                return await self._read_first_message(request, connection, grant)
        except TimeoutError:
            invalid = InvalidMessage("timeout", "the first message did not come in time")
            await _reject(connection, invalid, _POLICY_VIOLATION)
            return None

    async def _read_first_message(
        self, request: web.Request, connection: Connection, grant: Grant
    ) -> tuple[ClientSession, int] | None:
        """Reads messages until one of them begins or resumes a session.

        Returns:
          The session, and the number of the last event that the client has received. None: the client has gone, or
          the server has closed the connection.
        """
        for _ in range(_FIRST_MESSAGE_TRIES):
            data = await connection.receive()
            if connection.message_was_too_large:
                await _reject(connection, message_too_large(), _MESSAGE_TOO_BIG)
            if data is None:
                return None
            event_id = None
            try:
                message = FIRST_MESSAGES.read(data)
                event_id = message.event_id
                named = request.query.get(_ROUTED_BY)
                if named is not None and (not isinstance(message, Resume) or message.session_id != named):
                    text = f"the address names the session {named[:64]}: resume this session, or leave {_ROUTED_BY} out"
                    raise InvalidMessage("invalid_value", text, "session_id")
                if isinstance(message, Resume):
                    return await self._resume(connection, grant, message)
                self.manager.count_request(grant, SCOPE)  # before `check`, which has to tokenise texts
                configuration.check(message.session, self.service.model)
                return self._start(grant, message), 0
            except InvalidMessage as invalid:
                self.metrics.malformed_messages.labels(SCOPE).inc()
                self.service.log_refusal(invalid.code, str(invalid), request)
                invalid.event_id = invalid.event_id or event_id
                await connection.send(_first_error(invalid))
            except Refused as refused:
                self.service.count_refusal(refused, request)
                invalid = InvalidMessage(refused.code, str(refused), None, event_id)
                code = _POLICY_VIOLATION if refused.retry_after_s is None else _TRY_AGAIN_LATER
                await _reject(connection, invalid, code, refused.retry_after_s)
                return None
        await connection.close(_POLICY_VIOLATION, "no message that could be understood")
        return None

    def _start(self, grant: Grant, message: Start) -> ClientSession:
        def make_protocol(session: ClientSession) -> LiveProtocol:
            grace_s = self.manager.limits.grace_s
            return LiveProtocol(session, self.service.model, message.session, self.metrics, grace_s, message.event_id)

        return self.manager.admit(grant, make_protocol, SCOPE)

    async def _resume(self, connection: Connection, grant: Grant, message: Resume) -> tuple[ClientSession, int]:
        session = self.manager.resume(message.session_id, message.resume_token, message.after, grant)
        protocol = _live_protocol(session)
        session.prepare_resume()
        await connection.send(protocol.resumed_event(message.after, message.event_id))
        return session, message.after

    async def _read_offer(self, request: web.Request) -> CreateSession:
        """Returns the body of a request for a session over WebRTC.

        Raises:
          Refused: the body is wrong, or this server cannot give such a session.
        """
        try:
            body = read_json(await request.read(), CreateSession)
            if body.session.audio is not None and body.session.audio.format is not None:
                text = "WebRTC decides the format of sound itself"
                raise InvalidMessage("invalid_value", text, "session.audio.format")
            configuration.check(body.session, self.service.model)
        except InvalidMessage as invalid:
            raise invalid.as_refusal() from invalid
        return body


def _live_protocol(session: ClientSession) -> LiveProtocol:
    """Returns the protocol of a GPT-Live session. Raises `Refused` if the session has another protocol."""
    if not isinstance(session.protocol, LiveProtocol):
        raise Refused(404, "session_not_found", "that session uses another protocol")
    return session.protocol


async def _reject(
    connection: Connection, invalid: InvalidMessage, code: int, retry_after_s: float | None = None
) -> None:
    """Sends an `error` over a connection that carries no session, and closes the connection with `code`."""
    kind = "invalid_request_error" if retry_after_s is None else "rate_limit_error"
    await connection.send(_first_error(invalid, kind, retry_after_s))
    await connection.close(code, invalid.code)


def _first_error(
    invalid: InvalidMessage, kind: str = "invalid_request_error", retry_after_s: float | None = None
) -> bytes:
    """Returns an `error` for a client that has no session yet. It has no sequence number."""
    error = events.error_fields(invalid, kind)
    if retry_after_s is not None:
        error["retry_after_s"] = math.ceil(retry_after_s)
    return msgspec.json.encode({"type": "error", "event_id": "evt_first", "error": error})
