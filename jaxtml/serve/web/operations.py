"""Addresses for the people and programs that operate a server, and the list of its models.

| address | what |
|---|---|
| `/health` | the process is alive |
| `/ready` | the server takes sessions; 503 while it drains |
| `/metrics` | metrics in Prometheus' text format |
| `/v1/models`, `/v1/models/{model}` | the model and its aliases, in the format of OpenAI's API; needs a key |
"""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from jaxtml.serve.protocols.service import Service


def routes(service: Service) -> list[web.RouteDef]:
    """Returns the addresses of this module."""
    handlers = _Handlers(service)
    return [
        web.get("/health", handlers.health),
        web.get("/ready", handlers.ready),
        web.get("/metrics", handlers.metrics),
        web.get("/v1/models", handlers.models),
        web.get("/v1/models/{model:.+}", handlers.model),  # names may contain slashes
    ]


class _Handlers:
    def __init__(self, service: Service):
        self.service = service
        self.began_at = int(time.time())

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """Says whether the server takes sessions: it has loaded and compiled the model, and does not drain.

        A full server is ready. It tells new clients when to come again. `sessions` is the number of slots that a new
        session cannot get. `capacity` minus `sessions` is the number of sessions that the server still admits.
        """
        self.service.manager.check_open()
        pool = self.service.manager.pool
        return web.json_response({"status": "ready", "sessions": pool.taken, "capacity": pool.capacity})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.service.metrics.text(), content_type="text/plain", charset="utf-8")

    async def models(self, request: web.Request) -> web.Response:
        self.service.authorise(request)
        model = self.service.model
        return web.json_response(
            {"object": "list", "data": [self._model(name) for name in (model.name, *model.aliases)]}
        )

    async def model(self, request: web.Request) -> web.Response:
        self.service.authorise(request)
        name = request.match_info["model"]
        self.service.check_model(name)
        return web.json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        """Returns what a client is told of the model under one of its names. `root` is the model's own name.

        `capabilities` is what the model takes besides sound and typed text. `background_text` means text that the user
        does not type: instructions, tools, earlier conversations, results.
        """
        model = self.service.model
        takes = {"background_text": model.reads_background, "pictures": model.sees}
        shared = {"id": name, "object": "model", "created": self.began_at, "owned_by": "jaxtml", "root": model.name}
        return shared | {"capabilities": takes}
