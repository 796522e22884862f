"""The voices of one split of an utterance bank, indexed by voice, by word and by reply.

A session draws its user, the user's sentences and single words, and the assistant's replies from here. Called by
`jaxtml.data.talks.mix` and its neighbours, by `jaxtml.data.conversations` and by `jaxtml.evals.material`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxtml.data.talks.edits import Clip
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError


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
      single_words: voice -> word -> the places where the voice says the word alone, followed by a pause. A place is
        (index of the utterance, number of the word in it).
    """

    bank: UtteranceSource
    users: np.ndarray
    by_voice: dict[str, np.ndarray]
    engines: dict[str, tuple[str, ...]]
    replies: dict[str, int]
    single_words: dict[str, dict[str, list[tuple[int, int]]]]

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
        return Speakers(
            bank=bank,
            users=users,
            by_voice={voice: np.asarray(indices) for voice, indices in by_voice.items()},
            engines={engine: tuple(voices) for engine, voices in engines.items()},
            replies=_index_replies(bank),
            single_words=_index_single_words(bank, split),
        )

    def clip(self, index: int) -> Clip:
        """Returns the sound and the words of the utterance at `index`."""
        utterance = self.bank.utterance(index)
        return Clip(np.asarray(utterance.wave, np.float32), tuple(utterance.words))

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


def _index_single_words(bank: UtteranceSource, split: str) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """Returns voice -> word -> `(index, word number)` of the utterances that say single words."""
    single_words: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for index in np.asarray(bank.select(split=split, role="words"), np.int64).tolist():
        utterance = bank.utterance(index)
        places = single_words.setdefault(utterance.voice, {})
        for number, word in enumerate(utterance.words):
            places.setdefault(word.text, []).append((index, number))
    return single_words
