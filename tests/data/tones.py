"""A bank without speech engines: every word is a tone of its own pitch, with known edges. For tests."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from jaxtml.data.bank import PlannedUtterance
from jaxtml.data.tasks import scenarios
from jaxtml.data.voices.utterance import Utterance
from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import SAMPLE_RATE

USER_TEXTS = (
    "hello there",
    f"say {scenarios.lists()[5]}",
    scenarios.lists()[-1],
    "what is three plus four",
    "nine minus two",
    f"my code is {scenarios.codes()[100]}",
    "is four more than two",
    "is monday a day",
    "i have a dog",
    "the number is forty two",
)
VOICES = ("tone:low", "tone:high")


def pitch(word: str) -> float:
    return 300.0 + zlib.crc32(word.encode()) % 2500


def spoken(text: str, voice: str, word_s: float = 0.3, gap_s: float = 0.03) -> Utterance:
    """Each word `word_s` of its own tone at amplitude 0.1, `gap_s` of silence between."""
    waves, words, at = [], [], 0
    n, gap = int(word_s * SAMPLE_RATE), int(gap_s * SAMPLE_RATE)
    for k, word in enumerate(text.split()):
        if k:
            waves.append(np.zeros(gap, np.float32))
            at += gap
        waves.append(0.1 * np.sin(2 * np.pi * pitch(word) * np.arange(n) / SAMPLE_RATE).astype(np.float32))
        words.append(Word(word, at / SAMPLE_RATE, (at + n) / SAMPLE_RATE))
        at += n
    return Utterance(np.concatenate(waves), tuple(words), voice, text)


def speak(item: PlannedUtterance) -> Utterance:
    """A stand-in for the engines in `bank.build`."""
    return spoken(item.text, item.voice)


@dataclass(frozen=True)
class ToneBank:
    """Every voice says every text, and names every word; the assistant says the replies."""

    utterances: tuple[Utterance, ...]
    roles: tuple[str, ...]
    digest: str = "tones"

    @staticmethod
    def made() -> ToneBank:
        users = [spoken(text, voice) for voice in VOICES for text in USER_TEXTS]
        named = [spoken(f"{a} {b}", voice, word_s=0.5, gap_s=0.2)
                 for voice in VOICES for a, b in zip(*(iter(scenarios.VOCABULARY),) * 2, strict=False)]  # fmt: skip
        replies = [spoken(text, "tone:own", word_s=0.35) for text in scenarios.assistant_texts()]
        parts = {"user": users, "words": named, "assistant": replies}
        return ToneBank(
            tuple(said for part in parts.values() for said in part),
            tuple(role for role, part in parts.items() for _ in part),
        )

    def utterance(self, i: int) -> Utterance:
        return self.utterances[i]

    def select(self, *, split: str, role: str) -> np.ndarray:
        return np.flatnonzero([split == "train" and mine == role for mine in self.roles])
