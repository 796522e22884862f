"""Requests for a session over WebRTC, as their clients make them: what the session is to be, and the peer's offer.

Called by the server's addresses. WebRTC is an extra, which is looked for when it is first asked for.
"""

from __future__ import annotations

import asyncio
import ipaddress
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from jaxtml.serve.protocols.live import protocol as live
from jaxtml.serve.protocols.live.messages import Create
from jaxtml.serve.protocols.messages import UNREADABLE
from jaxtml.serve.protocols.realtime.messages import RealtimeSessionConfig
from jaxtml.serve.sessions.errors import InvalidMessage, Refused
from jaxtml.serve.sessions.manager import ServedModel

if TYPE_CHECKING:
    from jaxtml.serve.transport.peer import Peer


async def read_live_offer(request: web.Request, model: ServedModel) -> Create:
    """GPT-Live's, JSON. Raises `Refused`."""
    try:
        asked = msgspec.json.decode(await request.read(), type=Create)
        if asked.session.audio is not None and asked.session.audio.format is not None:
            raise InvalidMessage("invalid_value", "WebRTC has a format of its own", "session.audio.format")
        live.check(asked.session, model)
    except InvalidMessage as invalid:
        raise Refused(400, invalid.code, str(invalid)) from invalid
    except UNREADABLE as error:
        raise Refused(400, "invalid_value", str(error)[:300]) from error
    return asked


async def read_realtime_offer(request: web.Request) -> tuple[str, RealtimeSessionConfig | None]:
    """The Realtime API's: the offer alone, or a form of it (`sdp`) and the session (`session`). Raises `Refused`."""
    form: dict[str, bytes] = {}
    try:
        if request.content_type == "multipart/form-data":
            for name, value in (await request.post()).items():
                read = value.file.read() if isinstance(value, web.FileField) else value
                form[name] = read.encode() if isinstance(read, str) else bytes(read)
        else:
            form["sdp"] = await request.read()
        session = msgspec.json.decode(form["session"], type=RealtimeSessionConfig) if "session" in form else None
        return form.get("sdp", b"").decode(), session
    except (*UNREADABLE, ValueError) as error:
        raise Refused(400, "invalid_value", str(error)[:300]) from error


async def open_peer(request: web.Request, sdp: str, sees: bool) -> Peer:
    """Who made this offer; it will be answered at the address that the request came to. Raises `Refused`."""
    try:
        peers = await asyncio.to_thread(_peers)  # a second of imports
    except ImportError as error:
        text = "this server has no WebRTC (pip install 'jaxtml[webrtc]'); over a WebSocket it has the same protocols"
        raise Refused(501, "webrtc_not_installed", text) from error
    assert request.transport is not None
    ours = ipaddress.ip_address(request.transport.get_extra_info("sockname")[0])
    if isinstance(ours, ipaddress.IPv6Address):
        ours = ours.ipv4_mapped or ours  # a server of both families has IPv4's in this form
    try:
        return await peers.Peer.from_offer(sdp, str(ours), sees)
    except ValueError as error:
        raise Refused(400, "invalid_sdp", str(error)) from error


def _peers() -> ModuleType:
    from jaxtml.serve.transport import peer

    return peer
