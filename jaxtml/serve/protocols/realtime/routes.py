"""The addresses of OpenAI's Realtime API.

| address | what |
|---|---|
| GET `/v1/realtime?model=` | WebSocket of a new session |
| GET `/v1/realtime?session_id=&resume_token=&after=` | WebSocket on which a client resumes its session |
| POST `/v1/realtime/calls` | a session over WebRTC: the client's offer, alone or in a form with the configuration |
| POST `/v1/realtime/calls/{session}/hangup` | ends the session |
| POST `/v1/realtime/client_secrets` | a short-lived key, for browsers, which must not see the real key |

The query may also have `auth_id`, the key. Azure's client (`openai.AzureOpenAI`) names the model in `deployment`, and
adds `api-version` to every address. There is one version here, so `api-version` has no effect. Any other parameter is
refused.

Listed in `serve.protocols.registry`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import msgspec
from aiohttp import web

from jaxtml.serve.protocols import signalling, websocket
from jaxtml.serve.protocols.live.protocol import SCOPE as LIVE_SCOPE
from jaxtml.serve.protocols.query import check_query
from jaxtml.serve.protocols.realtime.configuration import check_session
from jaxtml.serve.protocols.realtime.messages import ClientSecretRequest, RealtimeSessionConfig
from jaxtml.serve.protocols.realtime.protocol import SCOPE, RealtimeProtocol
from jaxtml.serve.protocols.service import Service, public_path
from jaxtml.serve.sessions.access import Grant
from jaxtml.serve.sessions.client_session import ClientSession
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.json_errors import read_json
from jaxtml.serve.transport.sound import VoiceTrack

_KEY_BYTES = 7000  # of a short-lived key: it is sent in a header, and aiohttp reads headers of up to 8 KB
# OpenAI's API opens a sideband of a session over WebRTC or SIP with `call_id`, and a session that only transcribes with
# `intent`.
_UNSUPPORTED_QUERY = {"call_id", "intent"}
_NEW, _RESUMED = {"model", "deployment"}, {"session_id", "resume_token", "after"}
_NO_EFFECT_QUERY = {"api-version"}
_OFFER_FIELDS = {"sdp", "session"}


def routes(service: Service) -> list[web.RouteDef]:
    """Returns the addresses of the Realtime API on a server."""
    handlers = _RealtimeHandlers(service)
    return [
        web.get("/v1/realtime", handlers.connect),
        web.post("/v1/realtime/calls", handlers.create_over_webrtc),
        web.post("/v1/realtime/calls/{session}/hangup", handlers.hang_up),
        web.post("/v1/realtime/client_secrets", handlers.create_client_secret),
    ]


class _RealtimeHandlers:
    def __init__(self, service: Service):
        self.service, self.manager, self.model = service, service.manager, service.model

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Runs a session over a WebSocket: a new session, or one that the client resumes."""
        grant = self.service.authorise(request)
        resumes = "session_id" in request.query
        for name in sorted(_UNSUPPORTED_QUERY & set(request.query)):
            raise Refused(400, "unsupported_parameter", f"this server does not support {name} in the query")
        headers = self._check_query(request, _NEW | _RESUMED if resumes else _NEW)
        if resumes:
            return await self._resume(request, grant, headers)
        config = self._config_of_key(grant)

        def make_protocol(session: ClientSession) -> RealtimeProtocol:
            return RealtimeProtocol(session, self.model, self.service.metrics, self.manager.limits.grace_s, config)

        return await websocket.run_new_session(self.service, request, grant, make_protocol, SCOPE, headers)

    async def create_over_webrtc(self, request: web.Request) -> web.Response:
        """Admits a session over WebRTC and answers the client's offer."""
        grant = self.service.authorise(request)
        no_effect = self._check_query(request, _NEW)
        self.manager.count_request(grant, SCOPE)
        sdp, config_of_request = await _read_offer(request)
        if config_of_request is not None:
            if grant.session is not None:
                text = "the short-lived key has the configuration of the session already"
                raise Refused(400, "invalid_value", text)
            self._check(config_of_request)
        config = self._config_of_key(grant) or config_of_request

        def make_protocol(session: ClientSession, track: VoiceTrack) -> RealtimeProtocol:
            grace_s = self.manager.limits.grace_s
            return RealtimeProtocol(session, self.model, self.service.metrics, grace_s, config, track)

        session, answer = await signalling.answer_offer(self.service, request, grant, sdp, make_protocol, SCOPE)
        headers = {"Location": f"{public_path(request)}/{session.id}"} | no_effect
        return web.Response(text=answer, status=201, content_type="application/sdp", headers=headers)

    async def create_client_secret(self, request: web.Request) -> web.Response:
        """Makes a short-lived key for one configuration of a session. The key is good for GPT-Live too."""
        grant = self.service.authorise(request)
        headers = self._check_query(request)
        if grant.session is not None:
            raise Refused(403, "insufficient_scope", "a short-lived key cannot make other keys")
        try:
            body = read_json(await request.read() or b"{}", ClientSecretRequest)
        except InvalidMessage as invalid:
            raise invalid.as_refusal() from invalid
        config = body.session or RealtimeSessionConfig(type="realtime")
        self._check(config)
        self.service.access.count_request(grant)
        expires_at = int(time.time()) + body.expires_after.seconds
        fields = msgspec.to_builtins(config)
        key = self.service.access.create_short_lived_key(grant, expires_at, (SCOPE, LIVE_SCOPE), fields)
        if len(key) > _KEY_BYTES:
            text = "the configuration of the session makes this short-lived key longer than an HTTP header may be"
            raise Refused(400, "string_above_max_length", f"{text}: send a session.update instead")
        session = {"id": "sess_of_secret", "object": "realtime.session"} | fields | {"model": self.model.name}
        return web.json_response({"value": key, "expires_at": expires_at, "session": session}, headers=headers)

    async def hang_up(self, request: web.Request) -> web.Response:
        """Ends a session."""
        headers = self._check_query(request)
        response = await self.service.hang_up(request)
        response.headers.update(headers)
        return response

    async def _resume(self, request: web.Request, grant: Grant, headers: Mapping[str, str]) -> web.StreamResponse:
        query = request.query
        try:
            after = int(query.get("after", "0"))
        except ValueError as error:
            raise Refused(400, "invalid_value", "after must be the number of an event") from error
        session = self.manager.resume(query["session_id"], query.get("resume_token", ""), after, grant)
        if session.protocol.scope != SCOPE:
            raise Refused(404, "session_not_found", "that session uses another protocol")
        response, connection = await websocket.open_connection(
            self.service, request, session.protocol.frame_kind, headers
        )
        session.prepare_resume()
        await self.service.run_session(connection, session, after)
        return response

    def _check_query(self, request: web.Request, used: Collection[str] = ()) -> dict[str, str]:
        """Checks the query of a request, and the model that it names. Returns headers of the answer.

        Raises:
          Refused: the query has a parameter that the address does not know, or names another model.
        """
        headers = check_query(request, SCOPE, used, _NO_EFFECT_QUERY)
        for name in _NEW:
            self.service.check_model(request.query.get(name))
        return headers

    def _check(self, config: RealtimeSessionConfig) -> None:
        """Checks the configuration in the body of a request. Raises `Refused` if this server cannot give it."""
        self.service.check_model(config.model)
        try:
            check_session(config, self.model)
        except InvalidMessage as invalid:
            raise invalid.as_refusal() from invalid

    def _config_of_key(self, grant: Grant) -> RealtimeSessionConfig | None:
        """Returns the configuration that a short-lived key fixes; None: the key is no short-lived key.

        Raises:
          Refused: the key was made for another model, or by a server of another version.
        """
        if grant.session is None:
            return None
        try:
            config = read_json(msgspec.json.encode(grant.session), RealtimeSessionConfig, "session")
        except InvalidMessage as invalid:
            raise invalid.as_refusal() from invalid
        self.service.check_model(config.model)
        return config


async def _read_offer(request: web.Request) -> tuple[str, RealtimeSessionConfig | None]:
    """Returns the offer of a client, and the configuration that it asks for, if it asks for one.

    The body is the offer alone, or a form with the fields `sdp` and `session`.

    Raises:
      Refused: the body cannot be read.
    """
    form: dict[str, bytes] = {}
    try:
        if request.content_type == "multipart/form-data":
            for name, value in (await request.post()).items():
                if name in form:
                    raise Refused(
                        400, "invalid_value", f"the form has the field {name[:64]} more than once", param=name
                    )
                content = value.file.read() if isinstance(value, web.FileField) else value
                form[name] = content.encode() if isinstance(content, str) else bytes(content)
            for name in sorted(set(form) - _OFFER_FIELDS):
                raise Refused(400, "unknown_parameter", f"a form with an offer has no field {name[:64]}")
        else:
            form["sdp"] = await request.read()
        config = read_json(form["session"], RealtimeSessionConfig, "session") if "session" in form else None
        return form.get("sdp", b"").decode(), config
    except InvalidMessage as invalid:
        raise invalid.as_refusal() from invalid
    except ValueError as error:
        raise Refused(400, "invalid_value", str(error)[:300]) from error
