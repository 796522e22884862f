"""Which text tokens stand in which micro-turn: the user's transcript, the assistant's text, and typed text.

A micro-turn (200 ms) has room for a few tokens only. Tokens without room move on to the next micro-turn, in order.
Called by `jaxtml.stream.encoding` and, for typed text, by `jaxtml.session.converse`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtml.config import DuplexConfig
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES


@dataclass(frozen=True)
class MicroTurnText:
    """The text tokens that one micro-turn generates before its gate.

    Attributes:
      heard: tokens of the user's transcript.
      text: tokens of the assistant's text.
    """

    heard: tuple[int, ...]
    text: tuple[int, ...]


def plan_text(
    conversation: Conversation, codec: TextCodec, config: DuplexConfig, *, heard_delay_ms: int, lead_ms: int
) -> list[MicroTurnText]:
    """Returns the tokens that each micro-turn generates.

    Words that would move past the end of the conversation are dropped. So are the assistant's words that would move
    past the end of their stretch of speech: they would be said outside it.

    Args:
      conversation: the words with their times.
      codec: turns words into token ids.
      config: how many tokens a micro-turn has room for.
      heard_delay_ms: milliseconds between the end of a user's word and the earliest time of its transcript.
      lead_ms: milliseconds by which the assistant's text precedes its sound.
    """
    micro_turns = len(conversation.user) // MICRO_TURN_SAMPLES
    heard = _place_words(
        [
            (int((word.end_s * 1000 + heard_delay_ms) // MICRO_TURN_MS), codec.encode(word.text))
            for word in conversation.user_words
        ],
        config.max_heard if config.heard else 0,
        0,
        micro_turns,
    )
    text: list[tuple[int, ...]] = [()] * micro_turns
    for speech in conversation.speech:
        # What a micro-turn outputs is heard one micro-turn later.
        words = [
            (int((word.start_s * 1000 - MICRO_TURN_MS - lead_ms) // MICRO_TURN_MS), codec.encode(word.text))
            for word in (*speech.words, *speech.unsaid)
        ]
        start, end = speech.start_micro_turn, speech.end_micro_turn
        placed = _place_words(words, config.max_text, start, min(end, micro_turns))
        text[start:end] = placed[start:end]
    return [MicroTurnText(heard_ids, text_ids) for heard_ids, text_ids in zip(heard, text, strict=True)]


def plan_typed(
    typed: Iterable[tuple[int, str]], codec: TextCodec, config: DuplexConfig, micro_turns: int
) -> list[tuple[int, ...]]:
    """Returns the typed tokens that each of `micro_turns` micro-turns is given.

    Args:
      typed: `(micro-turn, text)`.
      codec: turns text into token ids.
      config: how many tokens a micro-turn has room for.
      micro_turns: length of the session.
    """
    typed_in: dict[int, list[int]] = {}
    for micro_turn, text in typed:
        typed_in.setdefault(micro_turn, []).extend(codec.encode(text))
    waiting: list[int] = []
    plan: list[tuple[int, ...]] = []
    room = max(config.max_typed - 1, 0)  # the TYPED token takes one place
    for micro_turn in range(micro_turns):
        waiting += typed_in.get(micro_turn, [])
        plan.append(tuple(waiting[:room]))
        del waiting[:room]
    return plan


def _place_words(words: list[tuple[int, list[int]]], limit: int, first: int, end: int) -> list[tuple[int, ...]]:
    """Returns the tokens of each micro-turn in `[0, end)`.

    A word's tokens stand in its micro-turn, or in the next ones with room. No token stands before the micro-turn
    `first`. A word that does not fit whole is dropped, and so are all words after it: half a word would be read as
    another word.

    Args:
      words: `(micro-turn, token ids)` of each word, in order.
      limit: tokens that a micro-turn has room for.
      first: the first micro-turn that may have text.
      end: the micro-turn after the last one that may have text.
    """
    placed: list[list[int]] = [[] for _ in range(end)]
    current = first
    for micro_turn, ids in words:
        current = max(current, micro_turn)
        if len(ids) > sum(limit - len(tokens) for tokens in placed[current:]):
            break
        for token in ids:
            while len(placed[current]) >= limit:
                current += 1
            placed[current].append(token)
    return [tuple(tokens) for tokens in placed]
