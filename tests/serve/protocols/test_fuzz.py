"""Ten thousand wrong messages over each protocol, beside a session that must not be disturbed."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtml.serve.protocols.live.messages import FIRST_MESSAGES, SESSION_MESSAGES
from jaxtml.serve.protocols.realtime.messages import WEBSOCKET_MESSAGES
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.transport import connection
from tests.serve.serving import Serving, eventually, serving
from tests.serve.stepped import scripted

MESSAGES = 10_000
SOUND = base64.b64encode(bytes(640)).decode()
ODD: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1e308,
    "",
    "x" * 5000,
    "\ud800",
    "\x00",
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    SOUND,
]
LIVE = [
    {"type": "session.input_audio.append", "audio": SOUND},
    {"type": "session.thinking.append", "content": "the sky", "delegation_id": None},
    {"type": "session.commentary.append", "content": "the sky", "delegation_id": "dlg"},
    {"type": "session.input_text.append", "content": "the sky"},
    {"type": "session.input_image.append", "image": base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(60)).decode()},
    {"type": "session.update", "session": {"delegation": {"type": "client"}}},
    {"type": "session.input_audio.mute"},
    {"type": "session.input_audio.unmute"},
    {"type": "session.resume", "session_id": "a", "resume_token": "b", "after": 0},
    {"type": "session.start", "session": {"model": "small_test", "input": []}},
]
MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the sky"}]}
TOOL = {"type": "function", "name": "a", "parameters": {"properties": {"b": {"type": "string"}}}}
REALTIME = [
    {"type": "input_audio_buffer.append", "audio": SOUND},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}},
    {"type": "session.update", "session": {"type": "realtime", "tools": [TOOL], "output_modalities": ["text"]}},
    {"type": "conversation.item.create", "item": MESSAGE},
    {"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": "a", "output": "b"}},
    {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0, "audio_end_ms": 3},
    {"type": "conversation.item.delete", "item_id": "a"},
    {"type": "response.create", "response": {"metadata": {"a": "b"}, "instructions": "c"}},
    {"type": "response.cancel"},
]


def spoil(message: Any, rng: random.Random) -> Any:
    """Returns a copy of `message` in which something is missing, added or of another type."""
    if isinstance(message, dict) and message and rng.random() < 0.8:
        key = rng.choice(list(message))
        changed = dict(message)
        kind = rng.random()
        if kind < 0.15:
            del changed[key]
        elif kind < 0.3:
            changed[rng.choice(("event_id", "colour", "", "type", "audio"))] = rng.choice(ODD)
        else:
            changed[key] = spoil(message[key], rng)
        return changed
    if isinstance(message, list) and message and rng.random() < 0.7:
        return [spoil(message[0], rng)] * rng.choice((0, 1, 3))
    return rng.choice(ODD)


def json_frames(kinds: list[dict[str, Any]]) -> Callable[[random.Random], bytes]:
    def frame(rng: random.Random) -> bytes:
        message = spoil(rng.choice(kinds), rng)
        try:
            data = json.dumps(message).encode()
        except UnicodeEncodeError:
            data = b"\xed\xa0\x80"
        if rng.random() < 0.2 and data:
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(rng.randrange(4)) + data[at + rng.randrange(8) :]
        return data

    return frame


def moshi_frames(rng: random.Random) -> bytes:
    head = b"OggS" if rng.random() < 0.3 else b""
    return bytes([rng.choice((0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 255))]) + head + rng.randbytes(rng.randrange(300))


PROTOCOLS = {
    "live": ("/v1/live/sessions", json_frames(LIVE)),
    "realtime": ("/v1/realtime", json_frames(REALTIME)),
    "moshi": ("/api/chat", moshi_frames),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ten_thousand_wrong_messages_disturb_no_other_session(slots, engine, protocol, monkeypatch, caplog):
    monkeypatch.setattr(connection, "_MESSAGES_PER_SECOND", 1_000_000)
    caplog.set_level(logging.ERROR)
    path, frame = PROTOCOLS[protocol]
    rng = random.Random(7)

    async def noise(serving: Serving) -> int:
        """Sends all wrong messages, and connects again when the server closes. Returns the number of connections."""
        sent = connections = 0
        while sent < MESSAGES:
            connections += 1
            ws = await serving.http.ws_connect(serving.url + path)
            if protocol == "live":
                await ws.send_json({"type": "session.start", "session": {"model": "small_test"}})
            listening = asyncio.create_task(_listen(ws))
            while sent < MESSAGES and not ws.closed:
                await ws.send_frame(frame(rng), aiohttp.WSMsgType.BINARY)
                sent += 1
                if sent % 50 == 0:
                    await asyncio.sleep(0)
            await ws.ping()
            await asyncio.sleep(0.2)
            await ws.close()
            await asyncio.wait([listening])
        return connections

    async def test(serving: Serving) -> None:
        victim = await serving.start()
        session = serving.session()
        listening = asyncio.create_task(_listen(victim.ws))
        async with serving.ticking():
            connections = await noise(serving)
            await eventually(lambda: len(serving.manager.sessions) == 1)
            micro_turns = session.scheduled.micro_turns
            await eventually(lambda: session.scheduled.micro_turns > micro_turns + 3)
        assert not session.scheduled.end_reason and session.scheduled.attached
        assert connections == 1, "a wrong message does not end the session of its sender"
        assert serving.counted("duplex_sessions_ended_total", reason="internal_error") == 0
        assert serving.counted("duplex_malformed_messages_total", protocol=protocol) > MESSAGES / 3
        listening.cancel()

    serving(slots, engine, test, model=scripted({}))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def _listen(ws: aiohttp.ClientWebSocketResponse) -> None:
    async for _ in ws:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=400, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.fixed_dictionaries(
        {"type": st.sampled_from([message["type"] for message in (*LIVE, *REALTIME)])},
        optional={"event_id": JSON, "session": JSON, "item": JSON, "audio": JSON, "content": JSON, "response": JSON},
    ).map(lambda message: json.dumps(message).encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_read_as_a_message_or_an_error_with_a_reason(data):
    for messages in (FIRST_MESSAGES, SESSION_MESSAGES, WEBSOCKET_MESSAGES):
        try:
            messages.read(data)
        except InvalidMessage as invalid:
            assert invalid.code and 0 < len(str(invalid)) < 1000
