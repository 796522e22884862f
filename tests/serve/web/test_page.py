"""The page in Chromium, if Chromium is installed. Its fake microphone and camera talk to the small test model.

The tests drive Chromium over its DevTools protocol (`--remote-debugging-port`), which needs no driver.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from jaxtml.data.tasks import scenarios
from jaxtml.serve.web.static_page import PAGE
from tests.serve.serving import Serving, eventually, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_page_is_served_whole_and_loads_nothing_from_elsewhere(slots, engine):
    async def test(serving: Serving) -> None:
        async with serving.http.get(serving.url) as response:
            html = await response.text()
            assert response.status == 200 and response.content_type == "text/html"
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        parts = re.findall(r'(?:src|href)="([^"]+)"', html)
        assert "page.js" in parts and "style.css" in parts
        for part in (*parts, *(file.name for file in PAGE.iterdir()), "demo.flac"):
            if not part.startswith("data:"):
                async with serving.http.get(f"{serving.url}/{part}") as response:
                    assert response.status == 200 and await response.read()
        for file in PAGE.iterdir():
            text = file.read_text().replace("`http://localhost", "")  # an address that a message names
            assert not re.search(r"https?://|//cdn", text), f"{file.name} loads from another server"
            assert not re.search(r"""["'`]/[a-z]|location\.host\b""", text), f"{file.name} assumes to be at the root"
        async with serving.http.get(f"{serving.url}/../access.py") as response:
            assert response.status == 404

    serving(slots, engine, test)


class Browser:
    """A tab of Chromium. `errors` has the exceptions that the page raised."""

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

    async def press(self, key: str, alt: bool = False) -> None:
        """Presses Tab, Enter or a letter."""
        key = {"key": key, "code": f"Key{key.upper()}" if len(key) == 1 else key, "modifiers": int(alt)}
        key["windowsVirtualKeyCode"] = {"Tab": 9, "Enter": 13}.get(key["key"], ord(key["key"][0].upper()))
        text = {"text": "\r"} if key["key"] == "Enter" else {}
        await self.ask("Input.dispatchKeyEvent", type="keyDown", **key, **text)
        await self.ask("Input.dispatchKeyEvent", type="keyUp", **key)

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


def typed(serving: Serving) -> list[int]:
    return [token for one in serving.model_inputs() for token in one.text]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_person_talks_types_mutes_and_ends(slots, engine, tmp_path):
    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking():
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            assert "small_test" in await tab.run("document.getElementById('title').textContent")
            assert "three plus four" not in await tab.run("document.body.textContent"), "these are tiny's sentences"
            assert not await tab.run("document.getElementById('access').checkVisibility()")
            assert await tab.run("document.querySelectorAll('#cards li').length") > 1
            await tab.run("document.getElementById('talk').click()")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            session = serving.session()
            await tab.until("document.querySelectorAll('#words li').length > 1")
            await tab.run("document.getElementById('mute').click()")
            await tab.until("document.getElementById('mute').getAttribute('aria-pressed') === 'true'")
            await tab.run("text.value = 'the sky'; typing.requestSubmit()")
            await tab.until("document.getElementById('words').textContent.includes('the sky')")
            await tab.run("document.getElementById('camera').click()")
            await tab.until("document.getElementById('camera').getAttribute('aria-pressed') === 'true'")
            assert session.scheduled.jitter_buffer.muted and session.protocol.intake.received_bytes > 0
            given = serving.model_inputs()
            async with asyncio.timeout(20):
                while not any(one.patches is not None for one in given):
                    await asyncio.sleep(0.1)
                    given = [one for tick in serving.model.ticks[-50:] for one in tick.inputs.values()]
            await tab.run("document.getElementById('stop').click()")
            await tab.until("document.getElementById('state').textContent === 'The conversation is over'")
            assert not await tab.run("document.getElementById('talk').disabled")
            assert tab.errors == []

    serving(slots, engine, test)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_has_one_conversation_and_a_lost_connection_loses_nothing(slots, engine, tmp_path):
    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking(0.2):
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            await tab.run("document.getElementById('talk').click(); document.getElementById('talk').click()")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            session = serving.session()
            await eventually(lambda: session.protocol.intake.received_bytes > 48_000)
            began, before = time.monotonic(), session.protocol.intake.received_bytes
            session.connection.transport._transport.abort()
            await eventually(lambda: not session.scheduled.attached)
            await tab.until("document.getElementById('state').textContent.startsWith('Connection lost')")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            await eventually(
                lambda: session.protocol.intake.received_bytes - before > 0.9 * 48_000 * (time.monotonic() - began)
            )
            session.connection.transport._transport.abort()
            await tab.until("document.getElementById('state').textContent.startsWith('Connection lost')")
            await tab.run("document.getElementById('mute').click()")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            await eventually(lambda: session.scheduled.jitter_buffer.muted)
            taken = session.protocol.intake.received_bytes
            await asyncio.sleep(0.5)
            assert session.protocol.intake.received_bytes == taken, "the page sends no sound while it is muted"
            await tab.run("text.value = 'the sky'; typing.requestSubmit()")
            await eventually(lambda: typed(serving) == engine.codec.encode("the sky"))
            session.connection.transport._transport.pause_reading()
            await tab.run("text.value = 'a number'; typing.requestSubmit()")
            await asyncio.sleep(0.2)  # the message is on its way, and the server never reads it
            session.connection.transport._transport.abort()
            await tab.until("document.getElementById('state').textContent.startsWith('Connection lost')")
            put, heard = session.scheduled.jitter_buffer.push, []
            session.scheduled.jitter_buffer.push = lambda samples: (
                heard.append(not session.scheduled.jitter_buffer.muted),
                put(samples),
            )
            await tab.run("document.getElementById('mute').click()")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            await eventually(lambda: session.protocol.intake.received_bytes > taken + 24_000)
            both = engine.codec.encode("the sky") + engine.codec.encode("a number")
            await eventually(lambda: len(typed(serving)) >= len(both))
            assert typed(serving) == both, "no text reaches the model twice"
            assert all(heard), "the server unmutes before it takes the sound that waited for the connection"
            assert serving.session() is session and session.scheduled.micro_turns
            type_later = "text.value = 'later'; typing.requestSubmit(); text.value"
            assert await tab.run(f"document.getElementById('stop').click(); {type_later}") == "later", "no text is lost"
            assert tab.errors == []

    serving(slots, engine, test)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_camera_that_is_allowed_too_late_does_not_reach_the_next_conversation(slots, engine, tmp_path):
    slow = """
        const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        window.allow = [];
        navigator.mediaDevices.getUserMedia = async (wants) => {
          const stream = await ask(wants);
          if (wants.video) await new Promise((resolve) => allow.push(() => resolve(stream)));
          return stream;
        };"""

    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking():
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            await tab.run(slow)
            for count in (1, 2):
                await tab.run("document.getElementById('talk').click()")
                await tab.until("!document.getElementById('camera').disabled")
                await tab.run("document.getElementById('camera').click()")
                await tab.until(f"allow.length === {count}")
                if count == 1:
                    await tab.run("document.getElementById('stop').click()")
                    await tab.until("!document.getElementById('talk').disabled")
            pressed = "document.getElementById('camera').getAttribute('aria-pressed') === 'true'"
            await tab.run("allow[1]()")
            await tab.until(pressed)
            ours = await tab.run("document.getElementById('view').srcObject.id")
            await tab.run("allow[0]()")
            await asyncio.sleep(0.5)
            assert await tab.run("document.getElementById('view').srcObject.id") == ours
            assert await tab.run("document.getElementById('view').checkVisibility()") and await tab.run(pressed)
            assert tab.errors == []

    serving(slots, engine, test)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_keyboard_is_enough_and_every_control_has_a_name(slots, engine, tmp_path):
    focus = "document.activeElement.id"

    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking():
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            await tab.press("Tab")
            assert await tab.run(focus) == "talk"
            await tab.press("Enter")
            await tab.until("document.getElementById('state').textContent === 'Connected'")
            session = serving.session()
            assert await tab.run(focus) == "stop", "the focus moves to a button that is enabled"
            order = []
            for _ in range(2):
                await tab.press("Tab")
                order.append(await tab.run(focus))
            assert order == ["mute", "camera"]
            await tab.run("text.focus()")
            await tab.ask("Input.insertText", text="the sky")
            await tab.press("Enter")
            await tab.until("document.getElementById('words').textContent.includes('the sky')")
            assert await tab.run(focus) == "text"
            await tab.press("m", alt=True)
            await tab.until("document.getElementById('mute').getAttribute('aria-pressed') === 'true'")
            assert await tab.run("text.value") == "", "a shortcut types no letter"
            tree = (await tab.ask("Accessibility.getFullAXTree"))["nodes"]
            named = {
                (node["role"]["value"], node.get("name", {}).get("value", ""))
                for node in tree
                if any(one["name"] == "focusable" for one in node.get("properties", ()))
                or node.get("role", {}).get("value") in ("image", "log", "status", "button", "textbox")
            }
            assert all(name for role, name in named if role not in ("status", "RootWebArea")), named
            assert {("button", "End"), ("button", "Muted"), ("textbox", "Type to the model")} <= named
            assert ("log", "What was heard and said") in named
            await tab.press("s", alt=True)
            await tab.until("document.getElementById('state').textContent === 'The conversation is over'")
            assert session.scheduled.end_reason and tab.errors == []

    serving(slots, engine, test)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_camera_picture_reaches_the_model_the_right_way_round(slots, engine, tmp_path):
    """The camera shows a file whose left half is dark and whose right half is bright."""
    luma = np.full((240, 320), 16, np.uint8)
    luma[:, 160:] = 235
    header, grey = b"YUV4MPEG2 W320 H240 F10:1 Ip A1:1 C420jpeg\n", np.full(320 * 240 // 2, 128, np.uint8).tobytes()
    (tmp_path / "camera.y4m").write_bytes(header + (b"FRAME\n" + luma.tobytes() + grey) * 10)

    async def test(serving: Serving) -> None:
        flag = f"--use-file-for-fake-video-capture={tmp_path / 'camera.y4m'}"
        async with browser(serving.url, tmp_path / "profile", flag) as tab, serving.ticking():
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            await tab.run("document.getElementById('talk').click()")
            await tab.until("!document.getElementById('camera').disabled")
            await tab.run("document.getElementById('camera').click()")
            await tab.until("document.getElementById('view').checkVisibility()")
            seen: list[np.ndarray] = []
            async with asyncio.timeout(20):
                while len(seen) < 3:
                    await asyncio.sleep(0.1)
                    given = serving.model_inputs()
                    seen = [one.patches for one in given if one.patches is not None]
        (left, right) = seen[-1][:, -1]  # this model takes two patches: a picture of 51 x 38 pixels
        assert left[:30, :20].mean() < -1 and right[:30, :8].mean() > 1, (
            "the left half is dark and the right half is bright, in CLIP's normalisation"
        )

    serving(slots, engine, test)


# --- what a first-time user meets

STATE = "document.getElementById('state').textContent"
ADVICE = "document.getElementById('advice').textContent"
WORDS = "[...document.querySelectorAll('#words li')].map((line) => line.querySelector('b').textContent).join()"


def test_sentences_to_try_are_sentences_that_the_shipped_model_was_trained_on():
    shown = re.search(r"sentences: \[\n(.*?)\n  \]", (PAGE / "models.js").read_text(), re.DOTALL)
    assert shown is not None
    sentences = re.findall(r'\["([^"]+)", "[^"]+"\]', shown[1])
    assert len(sentences) == shown[1].count("\n") + 1 >= 4
    for sentence in sentences:
        assert scenarios.is_complete(sentence.split()) and scenarios.reply_to(sentence.split()) != scenarios.I_SEE


@asynccontextmanager
async def proxy(port: int, prefix: bytes) -> AsyncIterator[int]:
    """Runs a proxy that removes `prefix` from a request and passes it to the server at `port`. Yields its own port."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, old: bytes, new: bytes) -> None:
        while data := await reader.read(65536):
            writer.write(re.sub(old, new, data))
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", port)
        requests = copy(reader, their_writer, rb"^(GET|POST|OPTIONS) " + prefix, rb"\1 ")
        await asyncio.gather(requests, copy(their_reader, writer, b"^$", b""), return_exceptions=True)

    listener = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_under_any_path_converses_without_a_microphone(slots, engine, tmp_path):
    no_microphone = "Object.defineProperty(navigator, 'mediaDevices', { value: undefined })"
    never_resumes = """AudioContext.prototype.resume = () => new Promise(() => {});
        Object.defineProperty(BaseAudioContext.prototype, 'state', { get: () => 'suspended' })"""
    written = """import('./models.js').then(({ spellOut }) =>
        ['What is 3+4?', 'Is 12 more than 20?', 'my code is 391', '9 - 2', 'Say red, green!'].map(spellOut).join())"""

    async def test(serving: Serving) -> None:
        port = int(serving.url.rpartition(":")[2])
        async with proxy(port, b"/a/path") as through, browser("about:blank", tmp_path) as tab, serving.ticking():
            await tab.ask("Page.addScriptToEvaluateOnNewDocument", source=f"{no_microphone}; {never_resumes}")
            await tab.ask("Page.navigate", url=f"http://127.0.0.1:{through}/a/path/")
            await tab.until("document.getElementById('cards')?.children.length")
            advice = await tab.run(ADVICE)
            assert "https" in advice and "localhost" in advice and "Typing works" in advice
            assert await tab.run("talk.disabled && !text.disabled && !document.getElementById('unloaded')")
            await tab.run("text.value = 'the sky'; typing.requestSubmit()")
            await tab.until(f"{STATE} === 'Connected'")
            await eventually(lambda: typed(serving) == engine.codec.encode("the sky"))
            assert await tab.run(WORDS + ".startsWith('You typed')")
            assert not await tab.run("document.getElementById('stop').disabled"), "it can be ended"
            await tab.until(f"{STATE} === 'Your browser has not started the sound'")
            began = "document.getElementById('timeline').toDataURL()"
            await tab.run("document.getElementById('stop').click()")
            await tab.until(f"{STATE} === 'The conversation is over'")
            await tab.run("new Promise((resolve) => setTimeout(resolve, 100))")
            frozen = await tab.run(began)
            await asyncio.sleep(0.3)
            assert await tab.run(began) == frozen, "the clock stops at the end"
            assert (await tab.run(written)).split(",") == [
                "what is three plus four",
                "is twelve more than twenty",
                "my code is three nine one",
                "nine minus two",
                "say red green",
            ]
            assert tab.errors == []

    serving(slots, engine, test)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_says_what_is_wrong_and_what_to_do(slots, engine, tmp_path):
    ask = """
        const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        navigator.mediaDevices.getUserMedia = async (wants) => {
          if (window.answer instanceof Error) throw window.answer;
          if (window.answer) return new Promise(() => {});
          return window.stream = await ask(wants);
        };"""

    end = "document.getElementById('stop').click();"

    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking(0.02):
            await tab.until(f"document.getElementById('state') && {STATE} === 'Ready'")
            await tab.run(ask)
            for error, said in (
                ("NotAllowedError', 'Permission denied", "choose Allow"),
                ("NotAllowedError', 'Permission denied by system", "privacy settings"),
                ("NotFoundError', '", "Connect one"),
                ("NotReadableError', '", "Another program"),
            ):
                name, message = error.split("', '")
                await tab.run(f"answer = new DOMException('{message}', '{name}'); talk.click()")
                await tab.until(f"{ADVICE}.includes('{said}')", seconds=3)
                assert "You can also type" in await tab.run(ADVICE) and not await tab.run("talk.disabled")
            await tab.run("answer = 'never'; talk.click()")
            await tab.until(f"{STATE} === 'Waiting for the microphone'")
            await tab.run(end)
            await tab.until(f"{STATE} === 'Ready'")
            await tab.run("answer = null; talk.click()")
            await tab.until(f"{STATE} === 'Connected'")
            await tab.run("latency.value = '0.40 s'")
            await tab.run("const [track] = stream.getTracks(); track.stop(); track.dispatchEvent(new Event('ended'))")
            await tab.until(f"{STATE} === 'The microphone has stopped'")
            await tab.run("talk.click()")
            await tab.until(f"{STATE} === 'Connected'")
            await tab.run(end + end)  # the second click ends at once
            await tab.until(f"{STATE} === 'The conversation is over'")
            taken = [await serving.start() for _ in range(slots.capacity)]
            await tab.run("text.value = 'the sky'; typing.requestSubmit()")
            await tab.until(f"{STATE} === 'The server is full'")
            assert (await tab.run(ADVICE)).lower().count("try again in") == 1
            assert await tab.run("text.value") == "the sky", "text that reached nobody is not lost"
            assert await tab.run("latency.value") == "–", "latencies are those of one conversation"
            for client in taken:
                await client.ws.close()
            assert tab.errors == []

    serving(slots, engine, test)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_reload_goes_on_with_the_conversation_and_leaving_frees_its_place(slots, engine, tmp_path):
    async def test(serving: Serving) -> None:
        async with browser(serving.url, tmp_path) as tab, serving.ticking(0.02):
            await tab.until(f"document.getElementById('state') && {STATE} === 'Ready'")
            await tab.run("text.value = 'the sky'; typing.requestSubmit()")
            await tab.until(f"{STATE} === 'Connected'")
            session = serving.session()
            for _ in range(slots.capacity + 1):
                await tab.run("window.old = true")
                await tab.ask("Page.reload")
                await tab.until(f"!window.old && document.getElementById('state') && {STATE} === 'Connected'")
                assert serving.session() is session
            assert await tab.run(WORDS + ".startsWith('You typed')"), "the words are still there"
            await tab.run("text.value = 'a number'; typing.requestSubmit()")
            both = engine.codec.encode("the sky") + engine.codec.encode("a number")
            await eventually(lambda: typed(serving) == both)
            await tab.ask("Page.navigate", url="about:blank")
            await eventually(lambda: session.scheduled.away)
            async with serving.http.get(f"{serving.url}/ready") as ready:
                assert (await ready.json())["sessions"] == 0, "the place is free for others"
            assert tab.errors == []

    serving(slots, engine, test)
