"""Errors of JSON name the field and say which values it may have. No word of the JSON library reaches a client."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from jaxtml.errors import InputError
from jaxtml.serve.protocols.live.messages import SESSION_MESSAGES, CreateSession
from jaxtml.serve.protocols.realtime.messages import WEBSOCKET_MESSAGES, ClientSecretRequest
from jaxtml.serve.sessions.access import Access
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.json_errors import read_json

NOT_OURS = re.compile(r"`|\$\.|[Ee]num|msgspec|<class")


def error_of(message: dict[str, Any]) -> InvalidMessage:
    with pytest.raises(InvalidMessage) as refused:
        WEBSOCKET_MESSAGES.read(json.dumps(message).encode())
    return refused.value


def update(**session: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "realtime", **session}}


def audio(**input: Any) -> dict[str, Any]:
    return update(audio={"input": input})


def item(**fields: Any) -> dict[str, Any]:
    return {"type": "conversation.item.create", "item": fields}


FORMATS = '"audio/pcm", "audio/pcmu" or "audio/pcma"'


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        (update(type="live"), "session.type", 'must be "realtime", not "live"'),
        (update(output_modalities=["x"]), "session.output_modalities[0]", 'must be "audio" or "text", not "x"'),
        (
            update(output_modalities=[]),
            "session.output_modalities",
            "a list of 1 item or null, not a list of 0",
        ),
        (update(max_output_tokens=0), "session.max_output_tokens", 'an integer from 1 to 4096, "inf" or null, not 0'),
        (update(tool_choice="any"), "session.tool_choice", '"auto", "none", "required", an object or null, not "any"'),
        (update(tools=[{"type": "function", "name": "a b"}]), "session.tools[0].name", '{1,64}$, not "a b"'),
        (audio(format={"type": "mp3"}), "session.audio.input.format.type", f'must be {FORMATS}, not "mp3"'),
        (audio(format={"type": 5}), "session.audio.input.format.type", f"must be {FORMATS}, not 5"),
        (
            audio(format={"type": "audio/pcm", "rate": 8000}),
            "session.audio.input.format.rate",
            "must be 24000 or null, not 8000",
        ),
        (audio(format="pcm16"), "session.audio.input.format", 'must be an object or null, not "pcm16"'),
        (
            audio(turn_detection={"type": "vad"}),
            "session.audio.input.turn_detection.type",
            'must be "semantic_vad" or "server_vad", not "vad"',
        ),
        (
            audio(turn_detection={"type": "server_vad", "create_response": "yes"}),
            "session.audio.input.turn_detection.create_response",
            'must be true, false or null, not "yes"',
        ),
        (item(type="message", role="human", content=[]), "item.role", 'must be "assistant", "system" or "user"'),
        (item(type="letter"), "item.type", 'must be "message", "function_call_output" or "function_call", not'),
        (item(type="message", role="user", content="hi"), "item.content", "must be a list of at most 64 items"),
        ({"type": "response.create", "response": 7}, "response", "must be an object or null, not 7"),
        (
            {"type": "response.create", "response": {"metadata": {"a": 5}}},
            "response.metadata",
            "each value of response.metadata must be a string of at most 512 characters",
        ),
        (
            {"type": "response.create", "response": {"metadata": {"a" * 600: "b"}}},
            "response.metadata",
            "each key of response.metadata must be a string of at most 512 characters",
        ),
        ({"type": "conversation.item.delete", "item_id": "a" * 600}, "item_id", "a string of at most 512 characters"),
        ({"type": "conversation.item.delete", "item_id": None}, "item_id", "not null"),
        ({"type": "input_audio_buffer.append", "audio": "%"}, "audio", "audio: this is not base64"),
        ({"type": "input_audio_buffer.commit", "event_id": 5}, "event_id", "or null, not 5"),
    ],
)
def test_wrong_value_is_refused_with_the_allowed_values(message, param, text):
    error = error_of(message)
    assert (error.code, error.param) == ("invalid_value", param)
    assert text in str(error) and param in str(error) and not NOT_OURS.search(str(error))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Returns the path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in leaves(one, (*path, key)))]


def replaced(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


SESSION = {
    "type": "realtime",
    "audio": {
        "input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": {"type": "server_vad"}},
        "output": {"format": {"type": "audio/pcmu"}},
    },
    "output_modalities": ["audio"],
    "tools": [{"type": "function", "name": "a", "parameters": {}}],
    "max_output_tokens": 5,
}
LIVE_SESSION = {"model": "m", "audio": {"format": {"type": "audio/pcm", "rate": 16000}}, "input": []}
OFFER = {"session": LIVE_SESSION, "transport": {"type": "webrtc", "sdp": "v=0"}}


@pytest.mark.parametrize(
    ("read", "right"),
    [
        (WEBSOCKET_MESSAGES.read, {"type": "session.update", "session": SESSION}),
        (SESSION_MESSAGES.read, {"type": "session.update", "session": {"delegation": {"type": "client"}}}),
        (lambda data: read_json(data, ClientSecretRequest), {"expires_after": {"seconds": 60}, "session": SESSION}),
        (lambda data: read_json(data, CreateSession), OFFER),
    ],
)
def test_no_wrong_value_at_any_place_is_answered_in_the_words_of_the_library(read, right):
    read(json.dumps(right).encode())
    refused = 0
    for path in leaves(right):
        for wrong in (None, True, -1, 1.5, 10**30, "", "x" * 600, "\U0001f600", [], [[]], {}, {"`$.a`": 1}):
            try:
                read(json.dumps(replaced(right, path, wrong)).encode())
            except InvalidMessage as invalid:
                refused += 1
                text = str(invalid).replace("`$.a`", "")
                assert text and not NOT_OURS.search(text), (path, wrong)
    assert refused > 3 * len(leaves(right))


def test_file_of_keys_is_refused_in_the_same_words(tmp_path):
    file = tmp_path / "keys.json"
    for content, text in (
        (
            {"keys": [{"name": "a", "key": "sk-12345", "sessions": 0}]},
            "keys[0].sessions must be an integer of 1 or more, not 0",
        ),
        ({"keys": [{"name": "a", "key": "sk-12345", "minute": 1}]}, "there is no parameter keys[0].minute"),
        ({"keys": [{"key": "sk-12345"}]}, "keys[0].name is missing"),
        ({"keys": {}}, "keys must be a list, not an object"),
        ([], "this JSON must be an object, not a list of 0"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(InputError) as refused:
            Access.load(file, ("live",))
        assert text in str(refused.value) and not NOT_OURS.search(str(refused.value))


def test_type_that_is_not_known_here_is_left_to_the_words_of_the_library():
    class Odd(msgspec.Struct):
        at: frozenset[int]

    with pytest.raises(InvalidMessage, match="^at: ") as refused:
        read_json(b'{"at": 5}', Odd)
    assert refused.value.param == "at"
