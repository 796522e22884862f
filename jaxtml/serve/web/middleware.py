"""Checks the origin of every HTTP request, and answers refusals and failures in the format of OpenAI's APIs.

The rules, which the tests hold:

- The files of the page are for everyone. A page that may not use the server can then tell its user why.
- A page of this server may use the server. `Origin` must name the address of the request, compared as RFC 6454 says.
  Browsers that send `Sec-Fetch-Site: same-origin` have compared the two themselves.
- Without keys, a page is the server's own only under a name that no one else can own: a name of the loopback interface,
  or an IP address. An attacker can serve a page under another name and then let that name mean this machine (DNS
  rebinding). Without keys, only this rule protects the server.
- Pages of other origins may use the server if `--allow-origin` names their origin.
- Programs that are no browsers send no `Origin`, and this file asks nothing of them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from absl import logging
from aiohttp import web

from jaxtml.serve.protocols.service import PUBLIC_PREFIX, Service
from jaxtml.serve.sessions.errors import Refused
from jaxtml.serve.web import static_page
from jaxtml.serve.web.origins import ALL, OPAQUE, Origin
from jaxtml.serve.web.proxies import PublicAddress, public_address
from jaxtml.serve.web.site import Site

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Middleware:
    """Keeps pages of other origins out, and turns refusals and failures into answers.

    Args:
      service: the server.
      site: where browsers find the server, and which pages may use it.
    """

    def __init__(self, service: Service, site: Site):
        self.service, self.site = service, site

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers one request."""
        origin, foreign = request.headers.get("Origin"), False
        try:
            foreign = self._check_origin(request, origin)
            if request.method == "OPTIONS":
                response: web.StreamResponse = web.Response(status=204)
            elif request.method == "POST":
                response = await self._handle_in_time(request, handler)
            else:
                response = await handler(request)
        except Refused as refused:
            self.service.count_refusal(refused, request)
            response = refusal(refused)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            refused = Refused(error.status, "invalid_request", _message(error))
            self.service.count_refusal(refused, request)
            response = refusal(refused)
        except ConnectionError:  # the client is gone
            raise
        except Exception:
            logging.exception("%s %s failed", request.method, request.path)
            response = refusal(Refused(500, "internal_error", "the server failed"))
        if foreign and origin is not None and not response.prepared:
            _let_read(response, request, origin)
        return response

    def _check_origin(self, request: web.Request, origin: str | None) -> bool:
        """Returns whether the page that makes the request is of another origin, and allowed.

        Raises:
          Refused: the page may not use the server, or a header of the request cannot be used.
        """
        own_file = static_page.is_file(request, self.site.prefix)
        try:
            address = public_address(request, self.site.proxies)
            request[PUBLIC_PREFIX] = address.prefix
            parsed = None if origin in (None, OPAQUE) else Origin.parse(origin)
        except ValueError as error:
            if origin is None or own_file:
                return False
            raise Refused(400, "invalid_request", f"the request's Host or Origin cannot be used: {error}") from error
        if origin is None or own_file:
            return False
        if parsed is not None and self._is_own(request, parsed, address):
            return False
        if ALL in self.site.origins or (parsed or OPAQUE) in self.site.origins:
            return True
        raise Refused(403, "origin_not_allowed", self._remedy(parsed, address))

    def _is_own(self, request: web.Request, origin: Origin, address: PublicAddress) -> bool:
        """Returns whether a page of this server makes the request."""
        same = request.headers.get("Sec-Fetch-Site") == "same-origin" or origin.is_at(address.scheme, address.host)
        return same and bool(self.service.access.keys or origin.host.is_certain)

    def _remedy(self, origin: Origin | None, address: PublicAddress) -> str:
        """Returns why a page may not use the server, and what its operator can do."""
        if origin is None:
            return (
                "a page from a file or a sandbox may not use this server: open it from a web server, or start this "
                f"server with --allow-origin {OPAQUE}"
            )
        allow = f"start this server with --allow-origin {origin}"
        if origin.is_at(address.scheme, address.host):
            return (
                f"without keys, pages under a host name other than localhost may not use this server: {allow}, or with "
                "--keys"
            )
        return (
            f"pages of {origin} may not use this server, which the request calls {address.host}: {allow}; or, if a "
            "proxy in front changes the host, let it pass on the page's Host header"
        )

    async def _handle_in_time(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handles a request whose body may never come. Raises `Refused` if it takes too long."""
        try:
            async with asyncio.timeout(self.service.manager.limits.first_message_s):
                return await handler(request)
        except TimeoutError as error:
            raise Refused(408, "timeout", "the request did not come in time") from error


def _let_read(response: web.StreamResponse, request: web.Request, origin: str) -> None:
    """Lets a page of another origin read a response, and use the headers that it asks for (the CORS protocol)."""
    asked = request.headers.get("Access-Control-Request-Headers")
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Allow-Headers"] = asked or "Authorization, Content-Type"
    response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
    response.headers["Access-Control-Expose-Headers"] = "Jaxtml-No-Effect, Location, Retry-After"
    response.headers["Vary"] = "Origin, Access-Control-Request-Headers"


def _message(error: web.HTTPException) -> str:
    """Returns what aiohttp says is wrong with a request, in one line."""
    is_default = error.text == f"{error.status}: {error.reason}"  # says no more than the reason
    return " ".join((error.reason if is_default else error.text or error.reason).split())


def refusal(refused: Refused) -> web.Response:
    """Returns the answer to a request that is refused."""
    if refused.status == 500:
        kind = "server_error"
    elif refused.status == 429 or refused.status > 500:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error"
    body = {"error": {"message": str(refused), "type": kind, "code": refused.code, "param": refused.param}}
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(math.ceil(refused.retry_after_s))}
    return web.json_response(body, status=refused.status, headers=headers)
