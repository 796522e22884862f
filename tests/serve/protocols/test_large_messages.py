"""Messages as large as the protocols' own documents allow, and messages that are larger."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from jaxtml.serve.protocols.moshi import protocol as moshi
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions import intake
from jaxtml.serve.transport import connection
from tests.serve.protocols.realtime.test_realtime import open_session
from tests.serve.serving import Serving, eventually, serving
from tests.serve.stepped import scripted

LIMIT = 2**16


@pytest.fixture
def small_limit(monkeypatch):
    """Makes the largest message small, so that the tests are fast."""
    monkeypatch.setattr(connection, "MESSAGE_BYTES", LIMIT)
    monkeypatch.setattr(connection, "_REST_S", 0.3)


def error_of(frame: aiohttp.WSMessage) -> str | None:
    """Returns the code of the error in a frame, or for Moshi its text; None: the frame is no error."""
    if frame.type is aiohttp.WSMsgType.BINARY:
        return frame.data[1:].decode() if frame.data[:1] == moshi.ERROR else None
    event = json.loads(frame.data)
    return event["error"]["code"] if event["type"] == "error" else None


# The address of each protocol's WebSocket, and the message with which a session begins; None: it begins without one.
ADDRESSES = {
    "live": ("/v1/live/sessions", {"type": "session.start", "session": {"model": "small_test"}}),
    "realtime": ("/v1/realtime", None),
    "moshi": ("/api/chat", None),
}


@pytest.mark.parametrize("size", [LIMIT + 1, 40 * LIMIT])
@pytest.mark.parametrize("protocol", ADDRESSES)
def test_too_large_message_is_answered_with_an_error_before_the_close(
    slots, engine, small_limit, protocol, size, caplog
):
    path, first = ADDRESSES[protocol]

    async def test(serving: Serving) -> None:
        ws = await serving.http.ws_connect(serving.url + path)
        if first is not None:
            await ws.send_json(first)
        await eventually(lambda: serving.manager.sessions)
        session = serving.session()
        await ws.send_bytes(b"\1" * size)
        errors = [code async for frame in ws if (code := error_of(frame)) is not None]
        assert ws.close_code == 1009
        assert len(errors) == 1 and ("too_large" in errors[0] or "at most" in errors[0])
        await eventually(lambda: session.scheduled.end_reason is EndReason.INVALID)

    serving(slots, engine, test, model=scripted({}))
    assert "exceeds limit" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\1"])
@pytest.mark.parametrize("first", [None, {"type": "session.start", "session": {"model": "small_test"}}])
def test_message_of_endless_fragments_is_answered_with_an_error_before_the_close(
    slots, engine, small_limit, content, first, caplog
):
    """Pings between the fragments end no message."""
    begin = b"\x02\x80" + bytes(4)  # a binary frame that is not the last of its message; the mask is zero
    fragment = bytes([0, 0x80 + len(content)]) + bytes(4) + content
    some = 100 * fragment + b"\x89\x80" + bytes(4)

    async def test(serving: Serving) -> None:
        client = await serving.open()
        if first is not None:
            await client.ws.send_json(first)
            await client.until("session.started")
        network = client.ws._response.connection.transport
        network.write(begin)
        sent = 0
        while not client.ws.closed and sent < 40 * LIMIT and not network.is_closing():
            network.write(some)
            sent += len(some)
            await asyncio.sleep(0)
        assert (await client.until("error"))["error"]["code"] == "message_too_large"
        assert await client.closed() == 1009
        await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, model=scripted({}))
    assert "fragments are too many" in caplog.text


def test_message_in_many_fragments_behind_many_pings_is_read(slots, engine, small_limit):
    """A client that only pings for hours stays, and a message may take up to twice the limit on the wire."""

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        network = client.ws._response.connection.transport
        for _ in range(38):
            await client.ws.ping(bytes(100))
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")
        message = b'{"type": "input_audio_buffer.clear"' + b" " * (LIMIT // 16) + b"}"
        for _ in range(20):
            network.write(b"\x01\x80" + bytes(4))
            parts = (message[at : at + 8].ljust(8) for at in range(0, len(message), 8))
            network.write(b"".join(b"\x00\x88" + bytes(4) + part for part in parts))
            network.write(b"\x80\x80" + bytes(4))
            await client.until("input_audio_buffer.cleared")
        assert not client.events_of("error")

    serving(slots, engine, test, model=scripted({}))


def test_too_large_first_message_and_message_of_a_sideband_are_answered_too(slots, engine, small_limit):
    async def test(serving: Serving) -> None:
        early = await serving.open()
        await early.ws.send_bytes(bytes(LIMIT + 1))
        assert (await early.until("error"))["error"]["code"] == "message_too_large"
        assert await early.closed() == 1009
        client = await serving.start()
        sideband = await serving.open(f"/v1/live/sessions/{serving.session().id}/attach")
        await sideband.ws.send_bytes(bytes(LIMIT + 1))
        assert (await sideband.until("error"))["error"]["code"] == "message_too_large"
        assert await sideband.closed() == 1009
        await serving.advance()
        await client.until("session.output_audio.delta")

    serving(slots, engine, test, model=scripted({}))


def test_append_of_fifteen_mebibytes_is_taken_piece_by_piece(slots, engine):
    """327 s of sound: the jitter buffer has room for ten seconds, and the session decodes ten more."""

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        session = serving.session()
        taken = session.protocol.intake
        await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(15 * 2**20)).decode())
        await eventually(lambda: taken.received_bytes == 20 * 48_000)
        await serving.advance(5)
        assert taken.received_bytes == 20 * 48_000 and taken.waiting_samples <= 20 * 16_000
        assert not client.events_of("error") and not client.ws.closed

    serving(slots, engine, test, model=scripted({}))


def test_longer_append_is_refused_by_name(slots, engine, monkeypatch):
    monkeypatch.setattr(intake, "_MAX_APPEND_BYTES", 2**20)

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        sound = base64.b64encode(bytes(2**20 + 1)).decode()
        await client.send("input_audio_buffer.append", audio=sound, event_id="mine")
        error = (await client.until("error"))["error"]
        assert (error["code"], error["param"], error["event_id"]) == ("string_above_max_length", "audio", "mine")
        assert not serving.session().protocol.intake.received_bytes

    serving(slots, engine, test, model=scripted({}))


def test_large_picture_and_long_recording_in_a_message_are_taken(slots, engine, monkeypatch):
    seen: list[int] = []

    async def read_image(self: intake.Intake, image: bytes) -> np.ndarray:
        seen.append(len(image))
        return np.zeros((1, 2, 40, 40, 3), np.float32)

    monkeypatch.setattr(intake.Intake, "read_image", read_image)

    def part(kind: str, **fields: str) -> dict[str, Any]:
        return {"type": "message", "role": "user", "content": [{"type": kind, **fields}]}

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        photo = "data:image/jpeg;base64," + base64.b64encode(bytes(5_000_000)).decode()
        began = time.monotonic()
        for item in (
            part("input_image", image_url=photo),
            part("input_audio", audio=base64.b64encode(bytes(8 * 48_000 + 1)).decode()),
        ):
            await client.send("conversation.item.create", item=item)
            await client.until("conversation.item.done")
        assert seen == [5_000_000] and time.monotonic() - began < 5, "a large message does not hold up the next one"
        assert abs(serving.session().protocol.intake.waiting_samples - 8 * 16_000) < 64
        assert not client.events_of("error")

    serving(slots, engine, test, model=scripted({}))


def test_websocket_limit_has_room_for_the_longest_append_in_base64_wrapped_in_lines():
    lines = json.dumps(base64.encodebytes(bytes(15 * 2**20)).decode().replace("\n", "\r\n"))
    assert len(lines) + 1000 < connection.MESSAGE_BYTES
    assert isinstance(connection.new_websocket(), web.WebSocketResponse)
