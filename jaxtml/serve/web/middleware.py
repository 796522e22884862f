"""Checks the origin of every HTTP request, and answers refusals and failures in the format of OpenAI's APIs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection

from absl import logging
from aiohttp import web

from jaxtml.serve.protocols.service import Service
from jaxtml.serve.sessions.errors import Refused

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Middleware:
    """Keeps pages of other origins out, and turns refusals and failures into answers.

    Args:
      service: the server.
      origins: origins of pages, besides the server's own page, that may use the server; "*": all.
    """

    def __init__(self, service: Service, origins: Collection[str]):
        self.service, self.origins = service, frozenset(origins)

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers one request."""
        origin, foreign, allowed = request.headers.get("Origin"), True, False
        try:
            foreign = self._is_foreign(request, origin)
            allowed = not foreign or "*" in self.origins or origin in self.origins
            if not allowed:
                raise Refused(403, "origin_not_allowed", "pages of this origin may not use this server")
            if request.method == "OPTIONS":
                response: web.StreamResponse = web.Response(status=204)
            elif request.method == "POST":
                response = await self._handle_in_time(request, handler)
            else:
                response = await handler(request)
        except Refused as refused:
            self.service.metrics.rejections.labels(refused.code).inc()
            response = refusal(refused)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = refusal(Refused(error.status, "invalid_request", error.reason))
        except ConnectionError:  # the client is gone
            raise
        except Exception:
            logging.exception("%s %s failed", request.method, request.path)
            response = refusal(Refused(500, "internal_error", "the server failed"))
        if allowed and origin is not None and foreign and not response.prepared:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Vary"] = "Origin"
        return response

    def _is_foreign(self, request: web.Request, origin: str | None) -> bool:
        """Whether a page of another origin makes the request.

        Raises:
          Refused: the request has no usable Host header.
        """
        if origin is None:
            return False
        try:
            host = request.url.raw_host
        except ValueError as error:
            raise Refused(400, "invalid_request", "the Host header is invalid") from error
        # An attacker can serve a page under a host name and then let that name mean this machine (DNS rebinding). The
        # page then has the same host as its request. Without keys, only this check protects the server. So without keys
        # a page counts as the server's own only under the names of the loopback interface.
        return origin.partition("://")[2] != request.host or not self.service.access.keys and host not in _LOOPBACK

    async def _handle_in_time(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handles a request whose body may never come. Raises `Refused` if it takes too long."""
        try:
            async with asyncio.timeout(self.service.manager.limits.first_message_s):
                return await handler(request)
        except TimeoutError as error:
            raise Refused(408, "timeout", "the request did not come in time") from error


def refusal(refused: Refused) -> web.Response:
    """Returns the answer to a request that is refused."""
    if refused.status == 500:
        kind = "server_error"
    elif refused.status == 429 or refused.status > 500:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error"
    body = {"error": {"message": str(refused), "type": kind, "code": refused.code, "param": None}}
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(math.ceil(refused.retry_after_s))}
    return web.json_response(body, status=refused.status, headers=headers)
