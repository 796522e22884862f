"""Turns the tokens that a session generates into words, one micro-turn after the other.

Called by the session's engine and by the server's session manager: each session has a `Reader`.

The assistant can delegate: it writes a request to the background model, a larger model beside it. The control tokens
DELEGATE and END enclose the request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import Control

_MAX_TOKENS_PER_CHARACTER = 4  # a character has at most four bytes in UTF-8, and each byte may be a token


class Words(NamedTuple):
    """The text that one micro-turn added.

    Attributes:
      heard: text added to the transcript of the user.
      said: text added to the assistant's text.
      delegated: text added to a request to the background model.
      delegation_ended: whether a request was completed in this micro-turn.
    """

    heard: str
    said: str
    delegated: str
    delegation_ended: bool


class Reader:
    """Reads the tokens of one session. A request to the background model may last several micro-turns."""

    def __init__(self, codec: TextCodec, control_base: int):
        self._control_base = control_base
        self._heard, self._said, self._delegated = (_TextStream(codec) for _ in range(3))
        self._delegating = False

    def read(self, tokens: Iterable[int]) -> Words:
        """Returns the words of one micro-turn's generated tokens."""
        current: _TextStream | None = None  # where the next text token belongs
        delegation_ended = False
        for token in tokens:
            control = token - self._control_base
            if control < 0:
                if current is not None:
                    current.add(token)
            elif control == Control.HEARD:
                current = self._heard
            elif control == Control.SAY:
                current = self._delegated if self._delegating else self._said
            elif control == Control.DELEGATE:
                self._delegating, current = True, self._delegated
            elif control == Control.END:
                delegation_ended = delegation_ended or self._delegating
                self._delegating, current = False, self._said
        return Words(self._heard.take(), self._said.take(), self._delegated.take(), delegation_ended)


class _TextStream:
    """Text whose tokens come one by one. A character of several bytes is added with the last of its tokens."""

    def __init__(self, codec: TextCodec):
        self._codec = codec
        self._waiting: list[int] = []
        self._text = ""

    def add(self, token: int) -> None:
        self._waiting.append(token)
        text = self._codec.decode(self._waiting)
        if text.endswith("\ufffd") and len(self._waiting) < _MAX_TOKENS_PER_CHARACTER:
            return
        self._text += text
        self._waiting.clear()

    def take(self) -> str:
        """Returns the text since the last call."""
        taken, self._text = self._text, ""
        return taken
