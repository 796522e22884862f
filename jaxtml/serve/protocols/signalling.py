"""Signalling: from a client's WebRTC offer to a session that runs over the client's tracks and data channel.

Called by the routes of the protocols that offer WebRTC. WebRTC is an extra (`pip install -e '.[webrtc]'`), so its
modules are imported when the first offer comes.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from absl import logging
from aiohttp import web

from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Grant
from jaxtml.serve.sessions.client_session import ClientSession
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.protocol import SessionProtocol
from jaxtml.serve.transport.connection import Connection
from jaxtml.serve.transport.sound import VoiceTrack

if TYPE_CHECKING:
    from jaxtml.serve.transport.peer import Peer

_NOT_INSTALLED = (
    "this server has no WebRTC: the same protocols work over a WebSocket; to install WebRTC, run "
    "pip install -e '.[webrtc]' in the server's clone of jaxtml"
)

MakeTrackProtocol = Callable[[ClientSession, VoiceTrack], SessionProtocol]


async def answer_offer(
    service: Service, request: web.Request, grant: Grant, sdp: str, make_protocol: MakeTrackProtocol, scope: str
) -> tuple[ClientSession, str]:
    """Admits a session for the client that made an offer. Call `SessionManager.count_request` before.

    The session is paused until the client's peer connection is open; `_run_peer` waits for that in the background.

    Args:
      service: the server.
      request: the HTTP request that brought the offer.
      grant: what the client's key allows.
      sdp: the offer.
      make_protocol: makes the protocol of the new session, which puts speech on the given track.
      scope: name of the protocol.

    Returns:
      The session and the answer, in SDP.

    Raises:
      Refused: the offer or the session's configuration cannot be used, or the session is not admitted.
    """
    peer = await open_peer(request, sdp, service.model.sees)
    session = None
    try:
        session = service.manager.admit(grant, lambda session: make_protocol(session, peer.voice), scope)
        session.scheduled.detach()
        # The session waits for the client as after a lost connection: for the grace period, and additionally for the
        # time that a first connection may take.
        session.scheduled.waits_until += service.manager.limits.first_message_s
        answer = await peer.create_answer()
    except BaseException as error:
        if session is not None:
            session.scheduled.end(EndReason.LEFT)
        await peer.close(1011, "")
        if isinstance(error, InvalidMessage):  # from the session's configuration
            raise error.as_refusal() from error
        raise
    service.run_in_background(_run_peer(service, peer, session))
    return session, answer


async def open_peer(request: web.Request, sdp: str, sees: bool) -> Peer:
    """Returns the peer that made an offer.

    The answer will name the server's address to which the request came. The peer connects to the server there.

    Args:
      request: the HTTP request that brought the offer.
      sdp: the offer.
      sees: whether the model takes pictures; if not, the client's camera is declined.

    Raises:
      Refused: the offer cannot be used, or WebRTC is not installed.
    """
    try:
        peers = await asyncio.to_thread(_import_peers)  # the first import takes a second
    except ImportError as error:
        raise Refused(501, "webrtc_not_installed", _NOT_INSTALLED) from error
    assert request.transport is not None
    address = ipaddress.ip_address(request.transport.get_extra_info("sockname")[0])
    if isinstance(address, ipaddress.IPv6Address):
        # A server that listens on both families sees IPv4 addresses in IPv6 form.
        address = address.ipv4_mapped or address
    try:
        return await peers.Peer.from_offer(sdp, str(address), sees)
    except ValueError as error:
        raise Refused(400, "invalid_sdp", str(error)) from error


def _import_peers() -> ModuleType:
    from jaxtml.serve.transport import peer

    return peer


async def _run_peer(service: Service, peer: Peer, session: ClientSession) -> None:
    """Waits for the peer connection to open, then carries the session over it."""
    try:
        async with asyncio.timeout(service.manager.limits.first_message_s):
            await peer.wait_open()
        async with peer.feed_tracks(session.protocol.intake):
            await service.run_session(Connection(peer, service.metrics), session)
    except (TimeoutError, ConnectionError):
        session.scheduled.end(EndReason.GONE)
    except Exception:
        logging.exception("the peer of session %s failed", session.id)
        session.scheduled.end(EndReason.FAILED)
    finally:
        await peer.close(1001, "")
