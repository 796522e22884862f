"""The page in a browser, where there is one: a fake microphone plays a real recording to the shipped model.

Chromium is driven over its DevTools protocol (`--remote-debugging-port`), which needs no driver besides.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from jaxtml.serve import routes
from tests.serve.serving import Serving, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = Path(routes.__file__).parent / "page"


def test_the_page_is_served_whole_and_asks_nobody_else(served, engine):
    async def test(serving: Serving) -> None:
        async with serving.http.get(serving.url) as response:
            html = await response.text()
            assert response.status == 200 and response.content_type == "text/html"
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        parts = re.findall(r'(?:src|href)="([^"]+)"', html)
        assert "page.js" in parts and "style.css" in parts
        for part in (*parts, "live.js", "sound.js", "timeline.js", "demo.flac"):
            if not part.startswith("data:"):
                async with serving.http.get(f"{serving.url}/{part}") as response:
                    assert response.status == 200 and await response.read()
        for file in PAGE.iterdir():
            assert not re.search(r"https?://|//cdn", file.read_text()), f"{file.name} asks another server"
        async with serving.http.get(f"{serving.url}/../access.py") as response:
            assert response.status == 404

    serving(served, engine, test)


class Browser:
    """A tab of Chromium."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse):
        self.ws, self.number, self.errors = ws, 0, []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        await self.ws.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            answer = await asyncio.wait_for(self.ws.receive_json(), 30)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == self.number:
                return answer["result"]

    async def run(self, script: str) -> Any:
        found = await self.ask("Runtime.evaluate", expression=script, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 30) -> Any:
        async with asyncio.timeout(seconds):
            while not (value := await self.run(script)):
                await asyncio.sleep(0.1)
        return value


@asynccontextmanager
async def browser(url: str, folder: Path, *flags: str) -> AsyncIterator[Browser]:
    assert CHROMIUM is not None
    process = subprocess.Popen(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
            "--autoplay-policy=no-user-gesture-required",
            "--window-size=1100,900",
            *flags,
            "about:blank",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        found = None
        while found is None:
            line = await asyncio.to_thread(process.stderr.readline)
            assert line, "Chromium ended"
            found = re.search(r"ws://([\d.:]+)/", line)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://{found[1]}/json/list") as tabs:
                tab = next(one for one in json.loads(await tabs.text()) if one["type"] == "page")
            tab = Browser(await http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0))
            await tab.ask("Runtime.enable")
            await tab.ask("Page.enable")
            await tab.ask("Page.navigate", url=url)
            yield tab
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_person_talks_types_mutes_and_ends(served, engine, tmp_path):
    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking():
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            assert await tab.run("document.getElementById('model').textContent") == "small_test"
            assert not await tab.run("document.getElementById('access').checkVisibility()")
            assert await tab.run("document.querySelectorAll('#cards li').length") > 1
            await tab.run("document.getElementById('talk').click()")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            call = serving.call()
            await tab.until("document.querySelectorAll('#words li').length > 1")
            await tab.run("document.getElementById('mute').click()")
            await tab.until("document.getElementById('mute').getAttribute('aria-pressed') === 'true'")
            await tab.run("text.value = 'the sky'; typing.requestSubmit()")
            await tab.until("document.getElementById('words').textContent.includes('the sky')")
            await tab.run("document.getElementById('camera').click()")
            await tab.until("document.getElementById('camera').getAttribute('aria-pressed') === 'true'")
            assert call.session.hearing.muted and call.speaks.intake.taken > 0
            given = [one for tick in serving.model.ticks for one in tick.given.values()]
            async with asyncio.timeout(20):
                while not any(one.patches is not None for one in given):
                    await asyncio.sleep(0.1)
                    given = [one for tick in serving.model.ticks[-50:] for one in tick.given.values()]
            await tab.run("document.getElementById('stop').click()")
            await tab.until("document.getElementById('state').textContent === 'The conversation is over'")
            assert not await tab.run("document.getElementById('talk').disabled")
            assert tab.errors == []

    serving(served, engine, test)
