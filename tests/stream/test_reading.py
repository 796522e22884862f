"""Generated tokens become words, micro-turn after micro-turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jaxtml.stream.reading import Reader, Words
from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import Control as C

BASE = 300


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.train(["two", "forty two"], 270)


@pytest.fixture
def read(codec) -> Callable[..., Words]:
    """Reads text and control tokens of one session's next micro-turn."""
    reader = Reader(codec, BASE)

    def one(*parts: int | str) -> Words:
        return reader.read(
            t for part in parts for t in ([BASE + part] if isinstance(part, int) else codec.encode(part))
        )

    return one


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((C.LISTEN,), ("", "", "", False)),
        ((C.HEARD, "two", C.LISTEN), (" two", "", "", False)),
        ((C.SAY, "forty two", C.SPEAK), ("", " forty two", "", False)),
        ((C.HEARD, "is it", C.SAY, "yes", C.SPEAK), (" is it", " yes", "", False)),
        (
            (C.SAY, "well", C.DELEGATE, "look it up", C.END, "now", C.SPEAK),
            ("", " well now", " look it up", True),
        ),
        ((C.SAY, "so", C.END, "it", C.LISTEN), ("", " so it", "", False)),
    ],
)
def test_tokens_read_as_heard_said_and_delegated_text(read, parts, words):
    assert read(*parts) == words


def test_a_delegation_goes_on_until_its_end(read):
    assert read(C.SAY, "well", C.DELEGATE, "look", C.LISTEN) == ("", " well", " look", False)
    assert read(C.HEARD, "and", C.LISTEN) == (" and", "", "", False)
    assert read(C.SAY, "it up", C.END, C.LISTEN) == ("", "", " it up", True)
    assert read(C.SAY, "so", C.LISTEN) == ("", " so", "", False)


def test_a_character_in_several_micro_turns_is_read_when_it_is_whole(read, codec):
    tokens = codec.encode("é")[-2:]  # two bytes, two tokens
    assert codec.decode(tokens) == "é"
    reader = Reader(codec, BASE)
    assert reader.read([BASE + C.SAY, tokens[0]]).said == ""
    assert reader.read([BASE + C.HEARD, *codec.encode("two"), BASE + C.SAY, tokens[1]]) == (" two", "é", "", False)


def test_bytes_that_never_become_a_character_do_not_wait_forever(codec):
    reader = Reader(codec, BASE)
    broken = codec.encode("é")[-2]
    assert [reader.read([BASE + C.SAY, broken]).said for _ in range(4)][-1] == 4 * "\ufffd"
