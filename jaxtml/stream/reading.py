"""Generated tokens as words, one session's micro-turns after the other. Called by `converse` and the server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import Control

_CHARACTER = 4  # tokens that one character may need: its bytes in UTF-8, at most


class Words(NamedTuple):
    """What a micro-turn added to the text heard, said and delegated; `asked` says that a delegation is whole."""

    heard: str
    said: str
    delegated: str
    asked: bool


class Reader:
    """Reads one session. A delegation goes on over micro-turns until its END."""

    def __init__(self, codec: TextCodec, control_base: int):
        self.base = control_base
        self.heard, self.said, self.delegated = (_Text(codec) for _ in range(3))
        self.delegating = False

    def read(self, tokens: Iterable[int]) -> Words:
        """The words of a micro-turn's generated tokens."""
        into: _Text | None = None
        asked = False
        for token in tokens:
            control = token - self.base
            if control < 0:
                if into is not None:
                    into.add(token)
            elif control == Control.HEARD:
                into = self.heard
            elif control == Control.SAY:
                into = self.delegated if self.delegating else self.said
            elif control == Control.DELEGATE:
                self.delegating, into = True, self.delegated
            elif control == Control.END:
                asked = asked or self.delegating
                self.delegating, into = False, self.said
        return Words(self.heard.take(), self.said.take(), self.delegated.take(), asked)


class _Text:
    """Text of tokens that come one by one: a character whose bytes are in several is read with the last of them."""

    def __init__(self, codec: TextCodec):
        self.codec, self.waiting, self.text = codec, [], ""

    def add(self, token: int) -> None:
        self.waiting.append(token)
        text = self.codec.decode(self.waiting)
        if text.endswith("\ufffd") and len(self.waiting) < _CHARACTER:
            return
        self.text += text
        self.waiting.clear()

    def take(self) -> str:
        taken, self.text = self.text, ""
        return taken
