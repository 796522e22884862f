"""Base64 and data: URLs as clients write them, and fields that have no effect."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any

import pytest

from jaxtml.serve.protocols.messages import (
    Binary,
    Event,
    MessageTypes,
    PictureFile,
    Strict,
    decode_base64,
    decode_data_url,
    fields_without_effect,
    no_effect,
)
from jaxtml.serve.sessions.errors import InvalidMessage

DATA = bytes(range(251, 256)) + bytes(range(200))  # its base64 has both letters in which the alphabets differ


class Part(Strict):
    sound: Binary = Binary()
    picture: PictureFile = PictureFile()
    voice: Annotated[Any, no_effect("there is one voice")] = None


class Message(Event, tag="message"):
    part: Part
    more: list[Part] = []


MESSAGES = MessageTypes[Message](Message)


@pytest.mark.parametrize("size", range(6))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
@pytest.mark.parametrize("change", [lambda text: text, lambda text: text.rstrip("=\n"), lambda text: f"\r\n {text}\t"])
def test_base64_is_read_in_every_form_in_which_libraries_write_it(size, encode, change):
    data = DATA[: 100 + size]
    assert decode_base64(change(encode(data).decode())) == data


@pytest.mark.parametrize("text", ["*", "AA=A", "A", "AAAAA", "AA===", "====", "AAAA\x00", "ÄAAA", "AA.A", "data:,AAAA"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(ValueError, match="not base64"):
        decode_base64(text)


@pytest.mark.parametrize(
    "head",
    ["data:image/jpeg;base64,", "DATA:image/PNG;BASE64,", "data:image/jpeg;a=b;base64,", " data:image/png; base64,"],
)  # fmt: skip
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_picture_in_a_data_url_is_read(head, encode):
    assert decode_data_url(head + encode(DATA).decode()) == DATA
    assert decode_data_url(head + encode(DATA).decode().replace("+", "%2B").replace("=", "%3D")) == DATA


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a.jpg", "nothing is downloaded"),
        ("data:text/plain;base64,AAAA", "must be a data: URL with the type image"),
        ("data:image/jpeg,AAAA", "must be in base64"),
        ("data:image/jpeg;base64", "must be a data: URL"),
        ("data:image/jpeg;base64,*", "not base64"),
        ("", "must be a data: URL"),
    ],
)
def test_other_url_is_refused_with_the_reason(url, reason):
    with pytest.raises(ValueError, match=reason):
        decode_data_url(url)


def test_fields_are_read_and_errors_name_them():
    read = MESSAGES.read(b'{"type": "message", "part": {"sound": "_-8", "picture": "data:image/png;base64,_-8"}}')
    assert (read.part.sound, read.part.picture) == (b"\xff\xef", b"\xff\xef")
    assert MESSAGES.read(b'{"type": "message", "part": {"picture": "/+8="}}').part.picture == b"\xff\xef"
    for value in ('"*"', "7", "null", "[]"):
        with pytest.raises(InvalidMessage) as refused:
            MESSAGES.read(b'{"type": "message", "part": {"sound": %s}}' % value.encode())
        assert (refused.value.code, refused.value.param) == ("invalid_value", "part.sound")


@pytest.mark.parametrize("where", ['"part": {"voice": [%s]}', '"more": [%s]', '"type": [%s]', '"unknown": [%s]'])
def test_message_of_very_many_values_is_refused_before_it_becomes_objects(where):
    """A message of 22 MiB of `[],[],[]` would take two seconds to read, and 800 MB."""
    values = b",".join([b"[]"] * 2**19)
    began_at = time.thread_time()
    with pytest.raises(InvalidMessage, match="at most 65536 values") as refused:
        MESSAGES.read(b'{"event_id": "mine", "type": "message", %s}' % (where.encode() % values))
    assert refused.value.event_id == "mine"
    assert time.thread_time() - began_at < 0.1


def test_fields_without_effect_are_found_wherever_they_are_set():
    read = MESSAGES.read(b'{"type": "message", "part": {"voice": null}, "more": [{}, {"voice": {"id": "a"}}]}')
    assert fields_without_effect(read) == {"more[1].voice": "there is one voice"}
