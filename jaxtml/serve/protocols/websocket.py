"""Sessions over a WebSocket. Called by the routes of the protocols."""

from __future__ import annotations

from aiohttp import WSMsgType, web

from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Grant
from jaxtml.serve.sessions.errors import Refused
from jaxtml.serve.sessions.manager import MakeProtocol
from jaxtml.serve.transport.connection import Connection, WebSocketTransport, new_websocket


async def open_connection(
    service: Service, request: web.Request, frame_kind: WSMsgType
) -> tuple[web.WebSocketResponse, Connection]:
    """Upgrades a request to a WebSocket. Returns the response and the connection.

    Args:
      service: the server.
      request: a GET that asks for the upgrade.
      frame_kind: kind of the messages that the server sends.
    """
    response = new_websocket()
    await response.prepare(request)
    return response, Connection(WebSocketTransport(request, response, frame_kind), service.metrics)


async def run_new_session(
    service: Service, request: web.Request, grant: Grant, make_protocol: MakeProtocol, scope: str
) -> web.StreamResponse:
    """Runs a session that begins as soon as its WebSocket is open, without a first message of the client.

    The session is admitted before the upgrade, so that a refused client gets a plain HTTP error.

    Args:
      service: the server.
      request: the client's GET.
      grant: what the client's key allows.
      make_protocol: makes the protocol of the new session.
      scope: name of the protocol.

    Raises:
      Refused: the request asks for no WebSocket, or the session is not admitted.
    """
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise Refused(426, "upgrade_required", "this address is a WebSocket: connect with ws:// or wss://")
    service.manager.count_request(grant, scope)
    session = service.manager.admit(grant, make_protocol, scope)
    try:
        response, connection = await open_connection(service, request, session.protocol.frame_kind)
    except BaseException:
        session.scheduled.end(EndReason.LEFT)
        raise
    await service.run_session(connection, session)
    return response
