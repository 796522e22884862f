"""Plans an utterance bank: which voice says which text, at what speed and pitch, in which shard.

A plan is a pure function of voices, texts, counts and a seed. Called by `jaxtml.data.conversations`, which has the plan
spoken by `jaxtml.data.bank.build`.

How to add a voice: add its name to `jaxtml.data.voices.registry` with its split (train or test, never both). Then add
two `VoiceGroup`s to `full_voice_groups`: one for sentences, and one with `single_words`. The second one says each word
of the vocabulary alone. `jaxtml.data.talks.user_turns` joins these recordings into new user turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtml.data.bank import PlannedUtterance
from jaxtml.data.tasks import scenarios
from jaxtml.data.voices import registry

WORDS_PER_UTTERANCE = 4
"""Single words in one utterance of a `single_words` group. A word alone is too short for the neural voices."""

_SLOW_SHARD, _QUICK_SHARD = 60, 240
"""Utterances of a shard. A shard takes about a minute to build. So a build that is killed loses about a minute of work
per worker, and the start of a process for each shard costs little in comparison."""

_VOCABULARY_ROUNDS = {"flite": 4, "piper": 4}
"""How often each voice says the whole vocabulary, for engines that have few voices. Other voices say it once."""

DrawText = Callable[[np.random.Generator], str]


@dataclass(frozen=True)
class VoiceGroup:
    """User voices of one engine and one split. The voices alternate: each utterance has the next voice of the group.

    Attributes:
      split: "train" or "test".
      voices: names as in `jaxtml.data.voices.registry`.
      count: sentences of the group; with `single_words`, how often each voice says the whole vocabulary.
      single_words: whether the voices say single words instead of sentences, a few per utterance.
      rate: bounds of the speed of speech, as factors.
      pitch: bounds of the pitch, as factors.
    """

    split: str
    voices: tuple[str, ...]
    count: int
    single_words: bool = False
    rate: tuple[float, float] = (0.85, 1.2)
    pitch: tuple[float, float] = (1.0, 1.0)


def full_voice_groups() -> tuple[VoiceGroup, ...]:
    """Returns the user voices of the bank that the config `tiny` is trained and tested on.

    Synthesis takes about an hour of CPU time, nearly all of it Kokoro's.
    """
    pitch = (0.92, 1.1)  # beyond these bounds a scaled spectrum sounds like no human voice
    slow = (0.55, 1.0)  # people say single words at about half the speed of words in a sentence
    word_voices = (
        ("train", registry.ESPEAK_TRAIN, (0.8, 1.35)),
        ("test", registry.ESPEAK_TEST, (0.85, 1.2)),
        ("train", registry.FLITE_TRAIN, pitch),
        ("test", registry.FLITE_TEST, (1.0, 1.0)),
        ("train", registry.PIPER_TRAIN, pitch),
        ("test", registry.KOKORO_TEST, (1.0, 1.0)),
        ("train", registry.KOKORO_TRAIN, pitch),
    )
    return (
        VoiceGroup("train", registry.ESPEAK_TRAIN, 9000, rate=(0.8, 1.1), pitch=(0.8, 1.35)),
        VoiceGroup("test", registry.ESPEAK_TEST, 500, rate=(0.8, 1.1), pitch=(0.85, 1.2)),
        VoiceGroup("train", registry.FLITE_TRAIN, 1200, pitch=pitch),
        VoiceGroup("test", registry.FLITE_TEST, 200),
        VoiceGroup("train", registry.PIPER_TRAIN, 500, pitch=pitch),
        VoiceGroup("test", registry.KOKORO_TEST, 120),
        VoiceGroup("train", registry.KOKORO_TRAIN, 920, pitch=pitch),
        VoiceGroup("train", registry.KOKORO_MIXED, 453, pitch=pitch),
        *(
            VoiceGroup(split, voices, _VOCABULARY_ROUNDS.get(voices[0].split(":")[0], 1), True, slow, word_pitch)
            for split, voices, word_pitch in word_voices
        ),
    )


def full_plan(seed: int) -> tuple[tuple[PlannedUtterance, ...], ...]:
    """Returns the plan of the bank for the config `tiny`: all replies and user texts of the short-answer task."""
    return plan_bank(
        full_voice_groups(),
        scenarios.assistant_texts(),
        lambda rng: scenarios.sample_user_text(rng)[1],
        seed,
        scenarios.VOCABULARY,
    )


def plan_bank(
    groups: Sequence[VoiceGroup],
    replies: Sequence[str],
    draw_user_text: DrawText,
    seed: int,
    vocabulary: Sequence[str] = (),
) -> tuple[tuple[PlannedUtterance, ...], ...]:
    """Plans a bank, as shards in the order in which they are built.

    The first shards hold every reply in the model's own voice. The utterances of users follow. Within a group the
    voices alternate. Groups that cost the same are interleaved in proportion to their size, so that any number of
    finished shards is a balanced bank. Users with Kokoro's voices come last, because Kokoro is thirty times slower than
    the other engines.

    Args:
      groups: the voices of the users.
      replies: texts of the model's own voice.
      draw_user_text: draws a sentence.
      seed: seed of the random generator that draws texts, rates and pitches.
      vocabulary: the words that groups with `single_words` say.
    """
    assistant = [PlannedUtterance("assistant", "train", registry.OWN_VOICE, reply) for reply in replies]
    quick, slow = [], []
    for number, group in enumerate(groups):
        planned = list(_plan_group(np.random.default_rng([seed, number]), group, draw_user_text, vocabulary))
        # Sorting by the relative position inside its group interleaves the groups in proportion to their size.
        (slow if group.voices[0].startswith("kokoro:") else quick).extend(
            ((index + 0.5) / len(planned), number, utterance) for index, utterance in enumerate(planned)
        )
    quick, slow = ([planned for *_, planned in sorted(part, key=lambda entry: entry[:2])] for part in (quick, slow))
    return tuple(
        tuple(part[first : first + size])
        for part, size in ((assistant, _SLOW_SHARD), (quick, _QUICK_SHARD), (slow, _SLOW_SHARD))
        for first in range(0, len(part), size)
    )


def _plan_group(
    rng: np.random.Generator, group: VoiceGroup, draw_user_text: DrawText, vocabulary: Sequence[str]
) -> Iterator[PlannedUtterance]:
    role = "words" if group.single_words else "user"
    texts = _word_texts(rng, group, vocabulary) if group.single_words else _sentences(rng, group, draw_user_text)
    for voice, text in texts:
        rate, pitch = (round(float(np.exp(rng.uniform(*np.log(bounds)))), 3) for bounds in (group.rate, group.pitch))
        yield PlannedUtterance(role, group.split, voice, text, rate, pitch)


def _sentences(rng: np.random.Generator, group: VoiceGroup, draw_user_text: DrawText) -> Iterator[tuple[str, str]]:
    """Yields `(voice, sentence)`."""
    for index in range(group.count):
        text = draw_user_text(rng)
        if text.split()[0] in ("is", "what") and rng.random() < 0.7:
            text += "?"  # the question mark gives the rising tone that most questions have
        yield group.voices[index % len(group.voices)], text


def _word_texts(rng: np.random.Generator, group: VoiceGroup, vocabulary: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields `(voice, a few words)`: each voice says every word `count` times.

    Each word is written as a sentence, so that it ends in the falling tone of a sentence.
    """
    orders = {
        voice: [str(word) for _ in range(group.count) for word in rng.permutation(vocabulary)] for voice in group.voices
    }
    for first in range(0, group.count * len(vocabulary), WORDS_PER_UTTERANCE):
        for voice in group.voices:
            yield voice, " ".join(f"{word}." for word in orders[voice][first : first + WORDS_PER_UTTERANCE])
