"""Reads an encoded conversation back: the inverse of `jaxtml.stream.encoding`, up to what encoding loses.

Called by `jaxtml.session.library`, for users who look into encoded conversations, and by tests, which check that
encoding and decoding agree.

Axes: T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxtml.config import DuplexConfig
from jaxtml.stream.conversation import Speech, Word
from jaxtml.stream.dmel import dequantise
from jaxtml.stream.layout import EncodedConversation
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control, PositionKind

_MICRO_TURN_S = MICRO_TURN_MS / 1000

_TextPieces = list[tuple[int, list[int]]]
"""Pieces of text in order, as `(micro-turn, token ids)`. A word may go on in the next piece."""


@dataclass(frozen=True)
class DecodedConversation:
    """The parts of a conversation that can be read back from its encoded form.

    Two things are left out: requests to the background model (`jaxtml.stream.layout`), and text in micro-turns in which
    the assistant is silent.

    Attributes:
      heard: the user's words, each with its micro-turn as its time.
      speech: the assistant's stretches of speech, each word with its micro-turn as its time.
      user_log_mel: `[4 * micro-turns, 80]` float32, within half a quantisation step (0.3) of the true log-mels.
    """

    heard: tuple[Word, ...]
    speech: tuple[Speech, ...]
    user_log_mel: np.ndarray


def decode(encoded: EncodedConversation, codec: TextCodec, config: DuplexConfig) -> DecodedConversation:
    """Reads an encoded conversation back. `jaxtml.stream.encoding` says what is lost, and by how much."""
    heard, said, speaking = _split_text(encoded, config.control_base)
    said_words = _to_words(said, codec)
    speech = tuple(
        Speech(start, end, tuple(w for w in said_words if start * _MICRO_TURN_S <= w.start_s < end * _MICRO_TURN_S))
        for start, end in _stretches(speaking)
    )
    user_bins = encoded.bins[encoded.kind == PositionKind.USER]
    return DecodedConversation(_to_words(heard, codec), speech, dequantise(user_bins))


def _split_text(encoded: EncodedConversation, control_base: int) -> tuple[_TextPieces, _TextPieces, list[int]]:
    """Returns the text that was heard, the text that was said, and the micro-turns in which the assistant speaks."""
    heard: _TextPieces = []
    said: _TextPieces = []
    speaking: list[int] = []
    current: _TextPieces | None = None  # where the next text token belongs
    for kind, token, micro_turn in zip(encoded.kind, encoded.ids, encoded.micro_turn, strict=True):
        if kind == PositionKind.TURN:
            current = None
        elif kind == PositionKind.TEXT and token >= control_base:
            current = {Control.HEARD: heard, Control.SAY: said, Control.END: said}.get(token - control_base)
            if current is not None:
                current.append((int(micro_turn), []))
        elif kind == PositionKind.TEXT and current is not None:
            current[-1][1].append(int(token))
        elif kind == PositionKind.OWN and (not speaking or speaking[-1] != micro_turn):
            speaking.append(int(micro_turn))
    return heard, said, speaking


def _stretches(micro_turns: list[int]) -> list[tuple[int, int]]:
    """Returns `(start, end)` of each run of consecutive micro-turns."""
    stretches: list[tuple[int, int]] = []
    for micro_turn in micro_turns:
        if stretches and stretches[-1][1] == micro_turn:
            stretches[-1] = (stretches[-1][0], micro_turn + 1)
        else:
            stretches.append((micro_turn, micro_turn + 1))
    return stretches


def _to_words(pieces: _TextPieces, codec: TextCodec) -> tuple[Word, ...]:
    """Joins the pieces and splits the text at spaces. A word belongs to the micro-turn of its first token."""
    words: _TextPieces = []
    for micro_turn, ids in pieces:
        for token in ids:
            if not words or codec.decode([token]).startswith(" "):
                words.append((micro_turn, [token]))
            else:
                words[-1][1].append(token)
    return tuple(
        Word(codec.decode(ids).strip(), micro_turn * _MICRO_TURN_S, (micro_turn + 1) * _MICRO_TURN_S)
        for micro_turn, ids in words
    )
