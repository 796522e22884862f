"""The HTTP application of a server: all its addresses behind one middleware.

| address | defined in |
|---|---|
| `/`, and the files of the page | `serve.web.static_page` |
| `/health`, `/ready`, `/metrics`, `/v1/models` | `serve.web.operations` |
| `/v1/live/...`, `/v1/realtime...`, `/api/chat` | the `routes` of each protocol, listed in `serve.protocols.registry` |

Called by `serve.serving`.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web

from jaxtml.serve.protocols.registry import PROTOCOLS
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.web import operations, static_page
from jaxtml.serve.web.middleware import Middleware

_BODY_BYTES = 2**16  # of an HTTP request


def application(service: Service, origins: Collection[str] = ()) -> web.Application:
    """Returns the application, for `aiohttp.web` to run.

    Args:
      service: the sessions, keys and model of the server.
      origins: origins of pages, besides the server's own page, that may use the server from a browser; "*": all.
    """
    middleware = Middleware(service, origins)
    app = web.Application(middlewares=[middleware.handle], client_max_size=_BODY_BYTES)
    app.add_routes(static_page.routes())
    app.add_routes(operations.routes(service))
    for routes in PROTOCOLS.values():
        app.add_routes(routes(service))

    async def shut_down(app: web.Application) -> None:
        del app
        await service.cancel_background_work()

    app.on_shutdown.append(shut_down)
    return app
