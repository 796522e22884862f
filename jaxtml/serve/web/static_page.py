"""The page on which a person talks to the model: `/` and the files in `page/`.

The page contains no personal data, so it needs no key.
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

PAGE = Path(__file__).parent / "page"
_FILES = {
    **{name: PAGE / name for name in ("index.html", "style.css", "page.js", "live.js", "sound.js", "timeline.js")},
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


async def _page(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(_FILES[request.path[1:] or "index.html"], headers=_HEADERS)
