"""The HTTP application of a server: all its addresses behind one middleware.

| address | defined in |
|---|---|
| `/`, and the files of the page | `serve.web.static_page` |
| `/health`, `/ready`, `/metrics`, `/v1/models` | `serve.web.operations` |
| `/v1/live/...`, `/v1/realtime...`, `/api/chat` | the `routes` of each protocol, listed in `serve.protocols.registry` |

Called by `serve.serving`.
"""

from __future__ import annotations

from aiohttp import web

from jaxtml.serve.protocols.registry import PROTOCOLS
from jaxtml.serve.protocols.service import Service, public_path
from jaxtml.serve.web import operations, static_page
from jaxtml.serve.web.middleware import Middleware
from jaxtml.serve.web.site import Site

_BODY_BYTES = 2**16  # of an HTTP request


def application(service: Service, site: Site | None = None) -> web.Application:
    """Returns the application, for `aiohttp.web` to run.

    Args:
      service: the sessions, keys and model of the server.
      site: where browsers find the server, and the other pages that may use it; None: the defaults of `Site`.
    """
    site = site or Site()
    middleware = Middleware(service, site)
    app = web.Application(middlewares=[middleware.handle], client_max_size=_BODY_BYTES)
    routes = [*static_page.routes(), *operations.routes(service)]
    for protocol_routes in PROTOCOLS.values():
        routes += protocol_routes(service)
    app.add_routes(routes)
    if site.prefix:
        app.add_routes([web.RouteDef(one.method, site.prefix + one.path, one.handler, one.kwargs) for one in routes])
        app.add_routes([web.get(site.prefix, _add_slash)])

    async def shut_down(app: web.Application) -> None:
        del app
        await service.cancel_background_work()

    app.on_shutdown.append(shut_down)
    return app


async def _add_slash(request: web.Request) -> web.Response:
    """Sends a browser from `/prefix` to `/prefix/`, where the relative addresses of the page are right."""
    query = f"?{request.query_string}" if request.query_string else ""
    raise web.HTTPPermanentRedirect(f"{public_path(request)}/{query}")
