"""The sessions of an evaluation: unseen voices take turns, some sessions are silent, all come from the seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from jaxtml.data.tasks import scenarios
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError
from jaxtml.evals.material import synthetic_talks
from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE


def spoken(text: str, voice: str) -> Utterance:
    """An utterance in which each word is 0.3 s of noise."""
    words = text.split()
    n = int(0.3 * SAMPLE_RATE)
    wave = 0.1 * np.random.default_rng(len(text)).standard_normal(n * len(words)).astype(np.float32)
    return Utterance(wave, tuple(Word(w, 0.3 * k, 0.3 * (k + 1)) for k, w in enumerate(words)), voice, text)


@dataclass(frozen=True)
class ThreeVoices:
    """A bank with the replies and three users' voices, all of which are in the split `split`."""

    utterances: tuple[Utterance, ...]
    split: str
    users: int
    digest: str = "three"

    @staticmethod
    def made(split: str) -> ThreeVoices:
        users = [
            spoken(text, voice) for voice in ("flite:a", "kokoro:b", "kokoro:c") for text in ("hello", "two plus two")
        ]
        replies = [spoken(text, "own") for text in scenarios.assistant_texts()]
        return ThreeVoices((*users, *replies), split, len(users))

    def utterance(self, i: int) -> Utterance:
        return self.utterances[i]

    def select(self, *, split: str, role: str) -> np.ndarray:
        if role == "assistant":
            return np.arange(self.users, len(self.utterances))
        return np.arange(self.users if split == self.split and role == "user" else 0)


def test_voices_take_turns_and_every_tenth_session_is_silent():
    bank = ThreeVoices.made("test")
    talks = synthetic_talks(bank, 20, turns=40)
    assert [talk.voice for talk in talks[:10]] == ["flite:a", "kokoro:b", "flite:a", "kokoro:c"] * 2 + [
        "flite:a",
        "nobody",
    ]
    assert len({talk.id for talk in talks}) == 20
    for number in (0, 1, 9):
        conversation = talks[number].make()
        assert len(conversation.user) == 40 * MICRO_TURN_SAMPLES
        assert bool(conversation.user_words) == (number != 9)
        np.testing.assert_array_equal(conversation.user, talks[number].make().user)


def test_a_bank_without_test_voices_is_refused():
    with pytest.raises(InputError, match="test"):
        synthetic_talks(ThreeVoices.made("train"), 4, turns=20)
