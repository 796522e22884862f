"""The protocols that the server speaks, one line each.

To add a protocol: make a folder beside `moshi/` with the protocol's class (it fulfils
`serve.sessions.protocol.SessionProtocol`) and a `routes.py`, and add a line here. The name is the protocol's scope in
the keys file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web

from jaxtml.serve.protocols.live import routes as live
from jaxtml.serve.protocols.moshi import routes as moshi
from jaxtml.serve.protocols.realtime import routes as realtime
from jaxtml.serve.protocols.service import Service

PROTOCOLS: Mapping[str, Callable[[Service], list[web.RouteDef]]] = {
    live.SCOPE: live.routes,
    realtime.SCOPE: realtime.routes,
    moshi.SCOPE: moshi.routes,
}
