"""The server's addresses: who may ask, what answers, and how a WebSocket, or a peer, becomes a session.

| address | |
|---|---|
| `/v1/live/sessions` | GPT-Live, `session.start` or `session.resume` first |
| `/v1/live/sessions/{id}/attach` | the same session from beside |
| `/v1/realtime` | OpenAI's Realtime API, `?model=`; `?session_id=&resume_token=&after=` to go on |
| POST `/v1/live/sessions`, `/v1/realtime/calls` | the same over WebRTC: an offer, and its answer |
| POST `.../{id}/hangup` | the end of a session, however it is carried |
| `/v1/realtime/client_secrets` | short-lived keys for browsers |
| `/api/chat` | Moshi's wire |
| `/v1/models` | what is served |
| `/` | a page to talk to it |
| `/health`, `/ready`, `/metrics` | for those who keep it up |

Called by `serve.serving`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from absl import logging
from aiohttp import WSMsgType, web

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.live import protocol as live
from jaxtml.serve.protocols.live.messages import FIRST, Resume, Start
from jaxtml.serve.protocols.messages import UNREADABLE
from jaxtml.serve.protocols.moshi import protocol as moshi
from jaxtml.serve.protocols.realtime import protocol as realtime
from jaxtml.serve.protocols.realtime.messages import RealtimeSessionConfig, SecretRequest
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Access, Grant
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.manager import ClientSession, ServedModel, SessionManager
from jaxtml.serve.transport.connection import (
    Connection,
    ConnectionEnd,
    MessageHandler,
    WebSocketTransport,
    new_websocket,
)
from jaxtml.serve.transport.sound import VoiceTrack
from jaxtml.serve.web import signalling

if TYPE_CHECKING:
    from jaxtml.serve.transport.peer import Peer

_FIRST_TRIES = 8  # malformed first messages
_SIDEBANDS = 4  # of a session
_BODY_BYTES = 2**16  # of an HTTP request
_CUT_OFF_S = 5.0
_KEY_BYTES = 7000  # of a key that is made here: aiohttp takes headers of 8 KB
_CODES = {
    EndReason.ASKED: 1000,
    EndReason.EXPIRED: 1000,
    EndReason.LEFT: 1000,
    EndReason.DRAINED: 1012,  # come again
    EndReason.GONE: 1001,
    EndReason.SLOW: 1008,
    EndReason.FAILED: 1011,
}
_HERE = Path(__file__).parent / "page"
_PAGE = {
    **{name: _HERE / name for name in ("index.html", "style.css", "page.js", "live.js", "sound.js", "timeline.js")},
    "demo.flac": Path(__file__).parents[2] / "assets" / "demo" / "human.flac",
}
_ENDS = {ConnectionEnd.SLOW: EndReason.SLOW, ConnectionEnd.LEFT: EndReason.LEFT}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY_PROTOCOL = "openai-insecure-api-key."  # browsers cannot set headers of a WebSocket

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Protocol = TypeVar("Protocol", live.LiveProtocol, realtime.RealtimeProtocol)


class Server:
    """The handlers of one server.

    Args:
      manager: its sessions.
      access: who may have them.
      model: the model that is served.
      metrics: what is counted.
      origins: of pages, besides its own, that may use it from a browser; "*": all.
    """

    def __init__(
        self,
        manager: SessionManager,
        access: Access,
        model: ServedModel,
        metrics: Metrics,
        origins: Collection[str] = (),
    ):
        self.manager, self.access, self.model, self.metrics = manager, access, model, metrics
        self.origins = frozenset(origins)
        self.began_at = int(time.time())
        self._peers: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        """The application, as `aiohttp.web` runs it."""
        app = web.Application(middlewares=[self._guarded], client_max_size=_BODY_BYTES)
        app.add_routes(
            [
                web.get("/", self.page),
                *(web.get(f"/{name}", self.page) for name in _PAGE),
                web.get("/health", self.health),
                web.get("/ready", self.ready),
                web.get("/metrics", self.measured),
                web.get("/v1/models", self.list_models),
                web.get("/v1/models/{model}", self.describe_model),
                web.get("/v1/live/sessions", self.live),
                web.post("/v1/live/sessions", self.live_offered),
                web.post("/v1/live/sessions/{session}/hangup", self.hung_up),
                web.get("/v1/live/sessions/{session}/attach", self.attached),
                web.get("/v1/realtime", self.realtime),
                web.post("/v1/realtime/calls", self.realtime_offered),
                web.post("/v1/realtime/calls/{session}/hangup", self.hung_up),
                web.post("/v1/realtime/client_secrets", self.secret),
                web.get("/api/chat", self.chat),
            ]
        )
        app.on_shutdown.append(self._cut_off)
        return app

    # --- for those who keep it up

    async def health(self, request: web.Request) -> web.Response:
        """The process is there."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """It takes sessions: loaded, compiled, not about to end. Full is ready: those who ask are told when to come."""
        self.manager.check_open()
        pool = self.manager.pool
        return web.json_response({"status": "ready", "sessions": len(pool.sessions), "capacity": pool.capacity})

    async def measured(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(body=self.metrics.text(), content_type="text/plain", charset="utf-8")

    async def list_models(self, request: web.Request) -> web.Response:
        self._grant(request)
        return web.json_response({"object": "list", "data": [self._model()]})

    async def describe_model(self, request: web.Request) -> web.Response:
        self._grant(request)
        self._check_model(request.match_info["model"])
        return web.json_response(self._model())

    def _check_model(self, name: str | None) -> None:
        """Raises `Refused` where another model than the one that is served is asked for; None asks for none."""
        if name not in (None, self.model.name):
            raise Refused(404, "model_not_found", f"this server has the model {self.model.name}")

    def _model(self) -> dict[str, str | int]:
        return {"id": self.model.name, "object": "model", "created": self.began_at, "owned_by": "jaxtml"}

    # --- the page

    async def page(self, request: web.Request) -> web.StreamResponse:
        """The page and what it is made of. It says nothing of anyone, so it is for everyone."""
        headers = {
            "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return web.FileResponse(_PAGE[request.path[1:] or "index.html"], headers=headers)

    # --- GPT-Live

    async def live(self, request: web.Request) -> web.StreamResponse:
        """A session's own connection."""
        grant = self._grant(request)
        ws = new_websocket()
        await ws.prepare(request)
        connection = Connection(WebSocketTransport(request, ws, WSMsgType.TEXT), self.metrics)
        try:
            async with asyncio.timeout(self.manager.limits.first_message_s):
                found = await self._first(connection, grant)
        except TimeoutError:
            await self._unlucky(connection, InvalidMessage("timeout", "the first message did not come in time"), 1008)
            return ws
        if found is not None:
            session, after = found
            assert isinstance(session.protocol, live.LiveProtocol)
            await self._run(connection, session, after, session.protocol.receive)
        return ws

    async def _first(self, connection: Connection, grant: Grant) -> tuple[ClientSession, int] | None:
        """The session that a connection is to carry, and up to which event its client has had it; None: it gave up."""
        for _ in range(_FIRST_TRIES):
            data = await connection.receive()
            if data is None:
                return None
            event_id = None
            try:
                message = FIRST.read(data)
                event_id = message.event_id
                if isinstance(message, Resume):
                    return await self._resumed(connection, grant, message)
                self.manager.ask(grant, live.SCOPE)  # before the work that texts are
                live.check(message.session, self.model)
                return self._started(grant, message), 0
            except InvalidMessage as invalid:
                self.metrics.malformed_messages.labels(live.SCOPE).inc()
                invalid.event_id = invalid.event_id or event_id
                await connection.send(_error(invalid))
            except Refused as refused:
                self.metrics.rejections.labels(refused.code).inc()
                invalid = InvalidMessage(refused.code, str(refused), None, event_id)
                code = 1008 if refused.retry_after_s is None else 1013
                await self._unlucky(connection, invalid, code, refused.retry_after_s)
                return None
        await connection.close(1008, "no message that could be understood")
        return None

    def _started(self, grant: Grant, message: Start) -> ClientSession:
        def make(session: ClientSession) -> live.LiveProtocol:
            limits = self.manager.limits
            return live.LiveProtocol(
                session, self.model, message.session, self.metrics, limits.grace_s, message.event_id
            )

        return self.manager.begin(grant, make, live.SCOPE)

    async def _resumed(self, connection: Connection, grant: Grant, message: Resume) -> tuple[ClientSession, int]:
        session = self.manager.resume(message.session_id, message.resume_token, message.after, grant)
        protocol = _speaking(session, live.LiveProtocol)
        protocol.untracked()
        if session.connection is not None:
            session.connection.replace()  # what it still has is not taken any more: the number of bytes is told now
        event = {
            "type": "session.resumed",
            "event_id": f"evt_resumed_{message.after}",
            "session_id": session.id,
            "input_audio_bytes": protocol.intake.received_bytes,
            "last_client_event_id": protocol.last_event_id,
        }
        if message.event_id is not None:
            event["client_event_id"] = message.event_id
        await connection.send(msgspec.json.encode(event))
        return session, message.after

    async def attached(self, request: web.Request) -> web.StreamResponse:
        """A connection beside the session's own."""
        grant = self._grant(request)
        session = self.manager.find(request.match_info["session"], grant)
        protocol = _speaking(session, live.LiveProtocol)
        if len(protocol.sidebands) >= _SIDEBANDS:
            raise Refused(429, "session_limit_exceeded", f"that session has its {_SIDEBANDS} sidebands", 5.0)
        self.access.count_request(grant)
        ws = new_websocket()
        await ws.prepare(request)
        connection = Connection(WebSocketTransport(request, ws, WSMsgType.TEXT), self.metrics)
        beside = live.Sideband(protocol)
        protocol.sidebands.append(beside)
        try:
            outcome = await connection.run(beside.replay_buffer, 0, beside.receive)
        finally:
            protocol.sidebands.remove(beside)
        await connection.close(*_goodbye(outcome, session))
        return ws

    # --- the Realtime API

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        """A session's connection: a new one, or one that goes on."""
        grant = self._grant(request)
        query = request.query
        if "session_id" in query:
            try:
                after = int(query.get("after", "0"))
            except ValueError as error:
                raise Refused(400, "invalid_value", "after is the number of an event") from error
            session = self.manager.resume(query["session_id"], query.get("resume_token", ""), after, grant)
            protocol = _speaking(session, realtime.RealtimeProtocol)
            ws = new_websocket()
            await ws.prepare(request)
            if session.connection is not None:
                session.connection.replace()  # as in `_resumed`
            protocol.untracked()
            connection = Connection(WebSocketTransport(request, ws, WSMsgType.TEXT), self.metrics)
            await self._run(connection, session, after, protocol.receive)
            return ws
        self._check_model(query.get("model"))
        begins_as = self._fixed(grant)

        def make(session: ClientSession) -> realtime.RealtimeProtocol:
            return realtime.RealtimeProtocol(session, self.model, self.metrics, self.manager.limits.grace_s, begins_as)

        return await self._begun(request, grant, make, WSMsgType.TEXT, realtime.SCOPE)

    def _fixed(self, grant: Grant) -> RealtimeSessionConfig | None:
        """What a short-lived key says of the session. Raises `Refused` where that is another model's."""
        if grant.session is None:
            return None
        config = msgspec.convert(grant.session, RealtimeSessionConfig)
        self._check_model(config.model)
        return config

    async def _begun(
        self,
        request: web.Request,
        grant: Grant,
        make: Callable[[ClientSession], realtime.RealtimeProtocol | moshi.MoshiProtocol],
        kind: WSMsgType,
        scope: str,
    ) -> web.StreamResponse:
        """A connection whose session begins with it: what is refused is refused before it is a WebSocket."""
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise Refused(426, "upgrade_required", "this address is a WebSocket's")
        session = self.manager.admit(grant, make, scope)
        ws = new_websocket()
        try:
            await ws.prepare(request)
        except BaseException:
            session.scheduled.end(EndReason.LEFT)
            raise
        assert isinstance(session.protocol, (realtime.RealtimeProtocol, moshi.MoshiProtocol))
        await self._run(
            Connection(WebSocketTransport(request, ws, kind), self.metrics), session, 0, session.protocol.receive
        )
        return ws

    async def secret(self, request: web.Request) -> web.Response:
        """A key for one who must not have the real one: for sessions as they are said here, and not for long."""
        grant = self._grant(request)
        if grant.session is not None:
            raise Refused(403, "insufficient_scope", "a short-lived key makes no others")
        try:
            asked = msgspec.json.decode(await request.read() or b"{}", type=SecretRequest)
        except UNREADABLE as error:
            raise Refused(400, "invalid_value", str(error)[:300]) from error
        config = asked.session or RealtimeSessionConfig(type="realtime")
        self._check_model(config.model)
        self.access.count_request(grant)
        expires_at = int(time.time()) + asked.expires_after.seconds
        session = msgspec.to_builtins(config)
        value = self.access.create_short_lived_key(grant, expires_at, (realtime.SCOPE, live.SCOPE), session)
        if len(value) > _KEY_BYTES:
            why = "a short-lived key carries its session, and this one would be longer than HTTP headers may be"
            raise Refused(400, "string_above_max_length", f"{why}: send a session.update instead")
        body = {"id": "sess_of_secret", "object": "realtime.session"} | session | {"model": self.model.name}
        return web.json_response({"value": value, "expires_at": expires_at, "session": body})

    # --- peers

    async def live_offered(self, request: web.Request) -> web.Response:
        """A GPT-Live session over WebRTC: its config and the offer, as JSON."""
        grant = self._grant(request)
        self.manager.ask(grant, live.SCOPE)  # before the work that offers are
        asked = await signalling.read_live_offer(request, self.model)

        def make(session: ClientSession, track: VoiceTrack) -> live.LiveProtocol:
            grace_s = self.manager.limits.grace_s
            return live.LiveProtocol(session, self.model, asked.session, self.metrics, grace_s, track=track)

        session, answer = await self._offered(request, grant, asked.transport.sdp, make, live.SCOPE)
        body = {"session": {"id": session.id}, "transport": {"type": "webrtc", "sdp": answer}}
        return web.json_response(body, status=201)

    async def realtime_offered(self, request: web.Request) -> web.Response:
        """A session of the Realtime API over WebRTC: the offer alone, or a form of it and the session."""
        grant = self._grant(request)
        self._check_model(request.query.get("model"))
        self.manager.ask(grant, realtime.SCOPE)
        sdp, said = await signalling.read_realtime_offer(request)
        if said is not None:
            if grant.session is not None:
                raise Refused(400, "invalid_value", "what a session is, a short-lived key says")
            self._check_model(said.model)
        begins_as = self._fixed(grant) or said

        def make(session: ClientSession, track: VoiceTrack) -> realtime.RealtimeProtocol:
            grace_s = self.manager.limits.grace_s
            return realtime.RealtimeProtocol(session, self.model, self.metrics, grace_s, begins_as, track)

        session, answer = await self._offered(request, grant, sdp, make, realtime.SCOPE)
        headers = {"Location": f"/v1/realtime/calls/{session.id}", "Access-Control-Expose-Headers": "Location"}
        return web.Response(text=answer, status=201, content_type="application/sdp", headers=headers)

    async def hung_up(self, request: web.Request) -> web.Response:
        """Ends a session."""
        self.manager.find(request.match_info["session"], self._grant(request)).scheduled.end(EndReason.ASKED)
        return web.Response()

    async def _offered(
        self,
        request: web.Request,
        grant: Grant,
        sdp: str,
        make: Callable[[ClientSession, VoiceTrack], live.LiveProtocol | realtime.RealtimeProtocol],
        scope: str,
    ) -> tuple[ClientSession, str]:
        """A session for who made this offer, and the answer; it stands still until that has come to something."""
        peer = await signalling.open_peer(request, sdp, self.model.config.duplex.max_patches > 0)
        session = None
        try:
            session = self.manager.begin(grant, lambda session: make(session, peer.voice), scope)
            session.scheduled.detach()
            session.scheduled.detached_at += self.manager.limits.first_message_s  # its grace is for who was there
            answer = await peer.create_answer()
        except BaseException as error:
            if session is not None:
                session.scheduled.end(EndReason.LEFT)
            await peer.close(1011, "")
            if isinstance(error, InvalidMessage):  # what the session is to begin as
                raise Refused(400, error.code, str(error)) from error
            raise
        task = asyncio.create_task(self._peered(peer, session))
        self._peers.add(task)
        task.add_done_callback(self._peers.discard)
        return session, answer

    async def _peered(self, peer: Peer, session: ClientSession) -> None:
        """Waits for a peer, and carries its session."""
        protocol = session.protocol
        assert isinstance(protocol, (live.LiveProtocol, realtime.RealtimeProtocol))
        try:
            async with asyncio.timeout(self.manager.limits.first_message_s):
                await peer.wait_open()
            async with peer.feed_tracks(protocol):
                await self._run(Connection(peer, self.metrics), session, 0, protocol.receive)
        except (TimeoutError, ConnectionError):
            session.scheduled.end(EndReason.GONE)
        except Exception:
            logging.exception("the peer of session %s failed", session.id)
            session.scheduled.end(EndReason.FAILED)
        finally:
            await peer.close(1001, "")

    async def _cut_off(self, app: web.Application) -> None:
        """Peers that are left when the server ends."""
        del app
        for task in self._peers:
            task.cancel()
        if self._peers:
            await asyncio.wait(self._peers, timeout=_CUT_OFF_S)

    # --- Moshi

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A session's connection; the session ends with it."""

        def make(session: ClientSession) -> moshi.MoshiProtocol:
            return moshi.MoshiProtocol(session, self.model, self.metrics)

        return await self._begun(request, self._grant(request), make, WSMsgType.BINARY, moshi.SCOPE)

    # --- connections

    async def _run(self, connection: Connection, session: ClientSession, after: int, receive: MessageHandler) -> None:
        """Carries a session until the connection or the session ends."""
        session.attach(connection)
        try:
            outcome = await connection.run(session.replay_buffer, after, receive)
            if outcome in _ENDS or session.protocol.scope == moshi.SCOPE:  # there is no way back to a session of that
                session.scheduled.end(_ENDS.get(outcome, EndReason.GONE))
        finally:
            session.detach(connection)
        await connection.close(*_goodbye(outcome, session))

    async def _unlucky(
        self, connection: Connection, invalid: InvalidMessage, code: int, retry_after_s: float | None = None
    ) -> None:
        """An error, and the end of a connection that never carried anything."""
        kind = "invalid_request_error" if retry_after_s is None else "rate_limit_error"
        await connection.send(_error(invalid, kind, retry_after_s))
        await connection.close(code, invalid.code)

    # --- who may ask

    def _grant(self, request: web.Request) -> Grant:
        """Raises `Refused`."""
        authorization = request.headers.get("Authorization", "")
        token = authorization[7:].strip() if authorization[:7].lower() == "bearer " else None
        token = token or request.query.get("auth_id")  # Moshi's clients have no other place for it
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        for protocol in (one.strip() for one in offered.split(",")):
            if protocol.startswith(_KEY_PROTOCOL):
                token = protocol.removeprefix(_KEY_PROTOCOL)
        return self.access.authenticate(token)

    async def _in_time(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Raises `Refused` where that takes too long."""
        try:
            async with asyncio.timeout(self.manager.limits.first_message_s):
                return await handler(request)
        except TimeoutError as error:
            raise Refused(408, "timeout", "the request did not come in time") from error

    def _foreign(self, request: web.Request, origin: str | None) -> bool:
        """Whether a page of another origin asks. Raises `Refused` where the request does not say for whom it is."""
        if origin is None:
            return False
        try:
            host = request.url.raw_host
        except ValueError as error:
            raise Refused(400, "invalid_request", "this Host is none") from error
        # A page may have a name that means this machine; where there are no keys, it is only its own page's.
        return origin.partition("://")[2] != request.host or not self.access.keys and host not in _LOOPBACK

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Pages of other origins stay out; what is refused, and what fails, is said in the API's way."""
        origin, foreign, allowed = request.headers.get("Origin"), True, False
        try:
            foreign = self._foreign(request, origin)
            allowed = not foreign or "*" in self.origins or origin in self.origins
            if not allowed:
                raise Refused(403, "origin_not_allowed", "pages of this origin may not use this server")
            if request.method == "OPTIONS":
                response: web.StreamResponse = web.Response(status=204)
            elif request.method == "POST":  # whose body may never come
                response = await self._in_time(request, handler)
            else:
                response = await handler(request)
        except Refused as refused:
            self.metrics.rejections.labels(refused.code).inc()
            response = _refused(refused)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = _refused(Refused(error.status, "invalid_request", error.reason))
        except ConnectionError:  # whoever asked is gone
            raise
        except Exception:
            logging.exception("%s %s failed", request.method, request.path)
            response = _refused(Refused(500, "internal_error", "the server failed"))
        if allowed and origin is not None and foreign and not response.prepared:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Vary"] = "Origin"
        return response


def _speaking(session: ClientSession, protocol: type[Protocol]) -> Protocol:
    """What speaks for a session. Raises `Refused` where that is another protocol."""
    if not isinstance(session.protocol, protocol):
        raise Refused(404, "session_not_found", "that session speaks another protocol")
    return session.protocol


def _goodbye(outcome: ConnectionEnd, session: ClientSession) -> tuple[int, str]:
    """Code and reason of a WebSocket's close."""
    if outcome is ConnectionEnd.REPLACED:
        return 1008, "another connection has taken over"
    if session.scheduled.end_reason is not None:
        return _CODES[session.scheduled.end_reason], session.scheduled.end_reason.value
    return 1001, ""


def _error(invalid: InvalidMessage, kind: str = "invalid_request_error", retry_after_s: float | None = None) -> bytes:
    error = live.error_of(invalid, kind)
    if retry_after_s is not None:
        error["retry_after_s"] = math.ceil(retry_after_s)
    return msgspec.json.encode({"type": "error", "event_id": "evt_first", "error": error})


def _refused(refused: Refused) -> web.Response:
    kind = "invalid_request_error" if refused.status < 500 and refused.status != 429 else "rate_limit_error"
    kind = "server_error" if refused.status == 500 else kind
    body = {"error": {"message": str(refused), "type": kind, "code": refused.code, "param": None}}
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(math.ceil(refused.retry_after_s))}
    return web.json_response(body, status=refused.status, headers=headers)
