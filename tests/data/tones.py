"""A bank without speech engines, for tests: every word is a tone of its own pitch, with known edges."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtml.data.bank import PlannedUtterance, build
from jaxtml.data.tasks import scenarios
from jaxtml.data.voices.utterance import Utterance
from jaxtml.stream.conversation import Word
from jaxtml.stream.text import TextCodec
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
    """Speaks each word as `word_s` of its own tone at amplitude 0.1, with `gap_s` of silence between words."""
    waves, words, start = [], [], 0
    n, gap = int(word_s * SAMPLE_RATE), int(gap_s * SAMPLE_RATE)
    for k, word in enumerate(text.split()):
        if k:
            waves.append(np.zeros(gap, np.float32))
            start += gap
        waves.append(0.1 * np.sin(2 * np.pi * pitch(word) * np.arange(n) / SAMPLE_RATE).astype(np.float32))
        words.append(Word(word, start / SAMPLE_RATE, (start + n) / SAMPLE_RATE))
        start += n
    return Utterance(np.concatenate(waves), tuple(words), voice, text)


def speak(planned: PlannedUtterance) -> Utterance:
    """Stands in for the speech engines in `bank.build`."""
    return spoken(planned.text, planned.voice)


@dataclass(frozen=True)
class ToneBank:
    """A bank of tones.

    Each user voice says every text, and the words of the vocabulary in pairs. The assistant says the replies.
    """

    utterances: tuple[Utterance, ...]
    roles: tuple[str, ...]
    digest: str = "tones"

    @staticmethod
    def made(lines: tuple[str, ...] = ()) -> ToneBank:
        """Returns a bank. `lines` are what the voice "human:tone" says to nobody in particular."""
        pairs = list(zip(*(iter(scenarios.VOCABULARY),) * 2, strict=False))
        by_role = {
            "user": [spoken(text, voice) for voice in VOICES for text in USER_TEXTS],
            "words": [spoken(f"{a} {b}", voice, word_s=0.5, gap_s=0.2) for voice in VOICES for a, b in pairs],
            "line": [spoken(text, "human:tone") for text in lines],
            "assistant": [spoken(text, "tone:own", word_s=0.35) for text in scenarios.assistant_texts()],
        }
        return ToneBank(
            tuple(utterance for utterances in by_role.values() for utterance in utterances),
            tuple(role for role, utterances in by_role.items() for _ in utterances),
        )

    def utterance(self, index: int) -> Utterance:
        return self.utterances[index]

    def select(self, *, split: str, role: str) -> np.ndarray:
        return np.flatnonzero([split == "train" and own_role == role for own_role in self.roles])


def write_data_folder(folder: Path, codec: TextCodec) -> None:
    """Writes a data folder as `jaxtml data` makes it. Its voices are tones instead of speech."""
    users = [
        PlannedUtterance("user", split, voice, text)
        for split, voice in (("train", "tone:low"), ("train", "tone:high"), ("test", "tone:unseen"))
        for text in USER_TEXTS
    ]
    replies = [PlannedUtterance("assistant", "train", "tone:own", text) for text in scenarios.assistant_texts()]
    build(folder / "bank", [users, replies], 1, speak)
    codec.save(folder / "tokenizer.json")
