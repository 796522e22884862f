"""The address of Moshi's protocol: GET `/api/chat`, a WebSocket. The session ends with it.

Listed in `serve.protocols.registry`.
"""

from __future__ import annotations

from aiohttp import web

from jaxtml.serve.protocols import websocket
from jaxtml.serve.protocols.moshi.protocol import SCOPE, MoshiProtocol
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.sessions.client_session import ClientSession


def routes(service: Service) -> list[web.RouteDef]:
    """Returns the address of Moshi's protocol on a server."""

    def make_protocol(session: ClientSession) -> MoshiProtocol:
        return MoshiProtocol(session, service.model, service.metrics)

    async def chat(request: web.Request) -> web.StreamResponse:
        grant = service.authorise(request)
        return await websocket.run_new_session(service, request, grant, make_protocol, SCOPE)

    return [web.get("/api/chat", chat)]
