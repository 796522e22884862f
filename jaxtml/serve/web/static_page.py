"""The page on which a person talks to the model: `/` and the files in `page/`.

The page contains no personal data, so it needs no key, and it loads whatever the origin of a request is. All its
addresses are relative: the page works under any path.
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

PAGE = Path(__file__).parent / "page"
_INDEX = "index.html"
_FILES = {
    **{path.name: path for path in sorted(PAGE.iterdir())},
    "demo.flac": Path(__file__).parents[2] / "assets" / "demo" / "human.flac",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def routes() -> list[web.RouteDef]:
    """Returns the addresses of the page."""
    return [web.get("/", _page), *(web.get(f"/{name}", _page) for name in _FILES)]


def is_file(request: web.Request, prefix: str) -> bool:
    """Returns whether a request asks for a file of the page. `prefix` may begin its path."""
    name = request.path.removeprefix(prefix).removeprefix("/")
    return request.method in ("GET", "HEAD") and (name or _INDEX) in _FILES


async def _page(request: web.Request) -> web.StreamResponse:
    name = request.path.rpartition("/")[2]  # a prefix may come before it
    return web.FileResponse(_FILES[name or _INDEX], headers=_HEADERS)
