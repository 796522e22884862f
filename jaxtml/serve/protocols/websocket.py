"""Sessions over a WebSocket. Called by the routes of the protocols."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from aiohttp import WSMsgType, web

from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Grant
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.manager import MakeProtocol
from jaxtml.serve.transport.connection import Connection, WebSocketTransport, new_websocket


async def open_connection(
    service: Service, request: web.Request, frame_kind: WSMsgType, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[web.WebSocketResponse, Connection]:
    """Upgrades a request to a WebSocket. Returns the response and the connection.

    Args:
      service: the server.
      request: a GET that asks for the upgrade.
      frame_kind: kind of the messages that the server sends.
      headers: further headers of the answer.

    Raises:
      Refused: the request asks for no WebSocket.
      web.HTTPBadRequest: the request's headers are not those of the WebSocket protocol.
    """
    _check_upgrade(request)
    response = new_websocket()
    response.headers.update(headers)
    await response.prepare(request)
    return response, Connection(WebSocketTransport(request, response, frame_kind), service.metrics)


async def run_new_session(
    service: Service,
    request: web.Request,
    grant: Grant,
    make_protocol: MakeProtocol,
    scope: str,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> web.StreamResponse:
    """Runs a session that begins as soon as its WebSocket is open, without a first message of the client.

    The session is admitted before the upgrade, so that a refused client gets a plain HTTP error.

    Args:
      service: the server.
      request: the client's GET.
      grant: what the client's key allows.
      make_protocol: makes the protocol of the new session.
      scope: name of the protocol.
      headers: further headers of the answer.

    Raises:
      Refused: the request asks for no WebSocket, the session is not admitted, or its configuration cannot be used.
    """
    _check_upgrade(request)  # before the session takes a slot
    service.manager.count_request(grant, scope)
    try:
        session = service.manager.admit(grant, make_protocol, scope)
    except InvalidMessage as invalid:  # from the configuration in a short-lived key
        raise invalid.as_refusal() from invalid
    try:
        response, connection = await open_connection(service, request, session.protocol.frame_kind, headers)
    except BaseException:
        session.scheduled.end(EndReason.LEFT)
        raise
    await service.run_session(connection, session)
    return response


def _check_upgrade(request: web.Request) -> None:
    """Raises `Refused` if a request does not ask for a WebSocket."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise Refused(426, "upgrade_required", "this address is a WebSocket: connect with ws:// or wss://")
