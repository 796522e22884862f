"""The voices of one split of an utterance bank, indexed by voice, by word and by reply.

A session draws its user, the user's sentences and single words, and the assistant's replies from here. Called by
`jaxtml.data.talks.mix` and its neighbours, by `jaxtml.data.conversations` and by `jaxtml.evals.material`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from jaxtml.data.talks.edits import Clip
from jaxtml.data.tasks.scenarios import VOCABULARY, is_complete, sample_user_text
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError

_SHORTEST_WORD_S = 0.22
"""Shorter words of fluent speech are slurred, and their edges are not exact enough to cut them out."""

_FEWEST_WORDS = 5
"""A person of whom fewer words of the task are recorded says no user turns."""


class UtteranceSource(Protocol):
    """The part of `jaxtml.data.bank.Bank` that mixing needs. Tests have a bank of tones instead.

    Two sources with the same `digest` have the same utterances at the same indices.
    """

    @property
    def digest(self) -> str: ...

    def utterance(self, index: int, /) -> Utterance: ...

    def select(self, *, split: str, role: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Speakers:
    """The utterances of one split of a bank, by who says them and what is said.

    Attributes:
      bank: gives the sound of an utterance.
      users: `[U]` int64, indices of the users' sentences in the bank.
      by_voice: voice -> `[n]` indices of its sentences.
      engines: engine -> its voices. Each voice is repeated once per sentence, so that a uniform draw prefers voices
        with many sentences.
      replies: text of a reply -> index of the assistant's utterance.
      lines: voice -> `[n]` indices of the recorded lines of a person. They are not said to the assistant: lines that
        are, or begin as, a sentence of the task are left out.
      single_words: voice -> word -> the places from which the word can be cut: where the voice says it alone, before
        a pause, or inside a recorded line. A place is (index of the utterance, number of the word in it).
      texts: voice -> sentences of the task that can be joined from its single words. Only for voices without sentences
        of their own, which are those of recorded people.
    """

    bank: UtteranceSource
    users: np.ndarray
    by_voice: dict[str, np.ndarray]
    engines: dict[str, tuple[str, ...]]
    replies: dict[str, int]
    single_words: dict[str, dict[str, list[tuple[int, int]]]]
    lines: dict[str, np.ndarray]
    texts: dict[str, tuple[str, ...]]

    @staticmethod
    def of(bank: UtteranceSource, split: str = "train") -> Speakers:
        """Indexes the users' voices of `split`, and the replies.

        Raises:
          InputError: the bank has no users' sentences in this split.
        """
        users = np.asarray(bank.select(split=split, role="user"), np.int64)
        if not len(users):
            raise InputError(
                f"the utterance bank has no user voices in its split {split!r}: build it with `jaxtml data`"
            )
        by_voice: dict[str, list[int]] = {}
        engines: dict[str, list[str]] = {}
        for index in users.tolist():
            voice = bank.utterance(index).voice
            engines.setdefault(voice.split(":")[0], []).append(voice)
            by_voice.setdefault(voice, []).append(index)
        single_words = _index_single_words(bank, split)
        texts = {
            voice: _coverable(words)
            for voice, words in single_words.items()
            if voice not in by_voice and len(words) >= _FEWEST_WORDS
        }
        for voice in texts:
            engines.setdefault(voice.split(":")[0], []).append(voice)
        return Speakers(
            bank=bank,
            users=users,
            by_voice={voice: np.asarray(indices) for voice, indices in by_voice.items()},
            engines={engine: tuple(voices) for engine, voices in engines.items()},
            replies=_index_replies(bank),
            single_words=single_words,
            texts=texts,
            lines=_index_lines(bank, split),
        )

    def clip(self, index: int) -> Clip:
        """Returns the sound and the words of the utterance at `index`."""
        utterance = self.bank.utterance(index)
        return Clip(np.asarray(utterance.wave, np.float32), tuple(utterance.words))

    def draw_line(self, rng: np.random.Generator) -> Clip | None:
        """Draws a recorded line: first the person, then the line. Returns None if the bank has no lines."""
        if not self.lines:
            return None
        voices = sorted(self.lines)
        indices = self.lines[voices[int(rng.integers(len(voices)))]]
        return self.clip(int(indices[int(rng.integers(len(indices)))]))

    def draw_voice(self, rng: np.random.Generator, engine_shares: tuple[tuple[str, float], ...]) -> str:
        """Draws the voice of a session's user: first the engine by its share, then one of its voices.

        A voice with more sentences is drawn more often. Engines that the bank does not have are left out. If the bank
        has none of the engines, all of its own engines have the same share.
        """
        present = [(engine, share) for engine, share in engine_shares if engine in self.engines]
        if not present:
            present = [(engine, 1.0) for engine in self.engines]
        shares = np.array([share for _, share in present])
        voices = self.engines[present[int(rng.choice(len(present), p=shares / shares.sum()))][0]]
        return voices[int(rng.integers(len(voices)))]


def _index_replies(bank: UtteranceSource) -> dict[str, int]:
    """Returns text -> index of each reply. All splits share the replies, which a bank stores in the split "train"."""
    replies = {}
    for index in np.asarray(bank.select(split="train", role="assistant"), np.int64).tolist():
        replies[" ".join(word.text for word in bank.utterance(index).words)] = index
    return replies


def _index_lines(bank: UtteranceSource, split: str) -> dict[str, np.ndarray]:
    """Returns voice -> indices of its lines that nobody has to answer."""
    lines: dict[str, list[int]] = {}
    for index in np.asarray(bank.select(split=split, role="line"), np.int64).tolist():
        utterance = bank.utterance(index)
        words = [word.text for word in utterance.words]
        if not any(is_complete(words[:k]) for k in range(1, len(words) + 1)):
            lines.setdefault(utterance.voice, []).append(index)
    return {voice: np.asarray(indices) for voice, indices in lines.items()}


def _index_single_words(bank: UtteranceSource, split: str) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """Returns voice -> word -> `(index, word number)` of the utterances that say single words."""
    single_words: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for index in np.asarray(bank.select(split=split, role="words"), np.int64).tolist():
        utterance = bank.utterance(index)
        places = single_words.setdefault(utterance.voice, {})
        for number, word in enumerate(utterance.words):
            places.setdefault(word.text, []).append((index, number))
    for index in np.asarray(bank.select(split=split, role="line"), np.int64).tolist():
        utterance = bank.utterance(index)
        for number, word in enumerate(utterance.words):
            if word.text in VOCABULARY and word.end_s - word.start_s >= _SHORTEST_WORD_S:
                places = single_words.setdefault(utterance.voice, {})
                places.setdefault(word.text, []).append((index, number))
    return single_words


def _coverable(words: Collection[str]) -> tuple[str, ...]:
    """Returns the sentences of the task that have no other words than these."""
    return tuple(text for text in _sentences() if set(text.split()) <= set(words))


@cache
def _sentences() -> tuple[str, ...]:
    """Returns some thousand different sentences of the task."""
    rng = np.random.default_rng(0)
    return tuple(dict.fromkeys(sample_user_text(rng)[1] for _ in range(20_000)))
