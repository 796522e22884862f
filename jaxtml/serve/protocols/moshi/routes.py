"""The address of Moshi's protocol: GET `/api/chat`, a WebSocket. The session ends with it.

Listed in `serve.protocols.registry`.
"""

from __future__ import annotations

from aiohttp import web

from jaxtml.serve.protocols import websocket
from jaxtml.serve.protocols.moshi.protocol import SCOPE, MoshiProtocol
from jaxtml.serve.protocols.query import check_query
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.sessions.client_session import ClientSession

# Query parameters of Moshi's web client and of its variants (PersonaPlex, MoshiVis).
_NO_EFFECT = {
    *("text_temperature", "text_topk", "audio_temperature", "audio_topk", "pad_mult", "text_seed", "audio_seed"),
    *("repetition_penalty", "repetition_penalty_context", "image_url", "image_resolution", "xa_start", "lora"),
    *("worker_auth_id", "email", "voice_prompt", "text_prompt", "seed"),
}


def routes(service: Service) -> list[web.RouteDef]:
    """Returns the address of Moshi's protocol on a server."""

    def make_protocol(session: ClientSession) -> MoshiProtocol:
        return MoshiProtocol(session, service.model, service.metrics)

    async def chat(request: web.Request) -> web.StreamResponse:
        grant = service.authorise(request)
        headers = check_query(request, SCOPE, no_effect=_NO_EFFECT)
        return await websocket.run_new_session(service, request, grant, make_protocol, SCOPE, headers)

    return [web.get("/api/chat", chat)]
