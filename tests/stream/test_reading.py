"""Generated tokens are read as words, one micro-turn after the other."""

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
    """Returns a function that reads the next micro-turn of one session, given as texts and control tokens."""
    reader = Reader(codec, BASE)

    def read_micro_turn(*parts: int | str) -> Words:
        tokens = ([BASE + part] if isinstance(part, int) else codec.encode(part) for part in parts)
        return reader.read(token for ids in tokens for token in ids)

    return read_micro_turn


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
def test_tokens_are_read_as_heard_said_and_delegated_text(read, parts, words):
    assert read(*parts) == words


def test_a_delegation_continues_over_micro_turns_until_its_end(read):
    assert read(C.SAY, "well", C.DELEGATE, "look", C.LISTEN) == ("", " well", " look", False)
    assert read(C.HEARD, "and", C.LISTEN) == (" and", "", "", False)
    assert read(C.SAY, "it up", C.END, C.LISTEN) == ("", "", " it up", True)
    assert read(C.SAY, "so", C.LISTEN) == ("", " so", "", False)


def test_a_character_in_several_micro_turns_is_read_with_its_last_token(read, codec):
    tokens = codec.encode("é")[-2:]  # two bytes, two tokens
    assert codec.decode(tokens) == "é"
    reader = Reader(codec, BASE)
    assert reader.read([BASE + C.SAY, tokens[0]]).said == ""
    assert reader.read([BASE + C.HEARD, *codec.encode("two"), BASE + C.SAY, tokens[1]]) == (" two", "é", "", False)


def test_bytes_that_never_become_a_character_do_not_wait_forever(codec):
    reader = Reader(codec, BASE)
    broken = codec.encode("é")[-2]
    assert [reader.read([BASE + C.SAY, broken]).said for _ in range(4)][-1] == 4 * "\ufffd"
