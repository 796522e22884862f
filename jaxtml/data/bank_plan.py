"""Plans an utterance bank: which voice says which text, at what speed and pitch, in which shard.

A plan is a pure function of voices, texts, counts, a seed, and the utterances that a bank already has. Called by
`jaxtml.data.conversations`, which has the plan spoken by `jaxtml.data.bank.build`.

A new text changes the random draws of most plans. So a plan for an existing bank keeps the bank's utterances where new
ones would be no better (`_keep_sentences`, `_keep_words`).

How to add a voice: add its name to `jaxtml.data.voices.registry` with its split (train or test, never both). Then add
two `VoiceGroup`s to `full_voice_groups`: one for sentences, and one with `single_words`. The second one says each word
of the vocabulary alone. `jaxtml.data.talks.user_turns` joins these recordings into new user turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxtml.data.bank import PlannedUtterance
from jaxtml.data.recordings import amazon_queen
from jaxtml.data.tasks import scenarios
from jaxtml.data.voices import registry

WORDS_PER_UTTERANCE = 4
"""Single words in one utterance of a `single_words` group. A word alone is too short for the neural voices."""

_SLOW_SHARD, _QUICK_SHARD = 60, 240
"""Utterances of a shard. A shard takes about a minute to build. So a build that is killed loses about a minute of work
per worker, and the start of a process for each shard costs little in comparison."""

_VOCABULARY_ROUNDS = {"flite": 4, "piper": 4}
"""How often each voice says the whole vocabulary, for engines that have few voices. Other voices say it once."""

_ROUNDING = 0.0005
"""A rate or a pitch may lie outside its bounds by this much, because it is rounded to three decimals."""

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


def full_plan(seed: int, spoken: Sequence[PlannedUtterance] = ()) -> tuple[tuple[PlannedUtterance, ...], ...]:
    """Returns the plan of the bank for the config `tiny`: all replies and user texts of the short-answer task.

    Args:
      seed: seed of the random draws.
      spoken: the utterances of a bank that the plan is appended to.
    """
    synthetic = plan_bank(
        full_voice_groups(),
        scenarios.assistant_texts(),
        lambda rng: scenarios.sample_user_text(rng)[1],
        seed,
        scenarios.VOCABULARY,
        spoken,
    )
    return (*synthetic, *plan_lines(spoken))


def plan_lines(spoken: Sequence[PlannedUtterance] = ()) -> tuple[tuple[PlannedUtterance, ...], ...]:
    """Returns the shards with recorded lines of people.

    If the recordings are not installed, these are the lines that a bank already has.
    """
    if amazon_queen.is_installed():
        splits = {voice: "train" for voice in registry.HUMAN_TRAIN} | {voice: "test" for voice in registry.HUMAN_TEST}
        lines = [
            PlannedUtterance("line", splits[line.voice], line.voice, line.text)
            for line in amazon_queen.lines()
            if line.voice in splits
        ]
    else:
        lines = [utterance for utterance in spoken if utterance.role == "line"]
    return tuple(tuple(lines[first : first + _QUICK_SHARD]) for first in range(0, len(lines), _QUICK_SHARD))


def plan_bank(
    groups: Sequence[VoiceGroup],
    replies: Sequence[str],
    draw_user_text: DrawText,
    seed: int,
    vocabulary: Sequence[str] = (),
    spoken: Sequence[PlannedUtterance] = (),
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
      spoken: utterances that a bank already has. Of two plans that serve equally well, the one with more of these
        utterances is returned. If `spoken` has all utterances of the plan for an empty bank, the result is that plan.
    """
    assistant = [PlannedUtterance("assistant", "train", registry.OWN_VOICE, reply) for reply in replies]
    quick, slow = [], []
    for number, group in enumerate(groups):
        planned = list(_plan_group(np.random.default_rng([seed, number]), group, draw_user_text, vocabulary))
        usable = [utterance for utterance in spoken if _fits(utterance, group)]
        planned = (_keep_words if group.single_words else _keep_sentences)(planned, usable)
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
    role = _role(group)
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


def _role(group: VoiceGroup) -> str:
    return "words" if group.single_words else "user"


# --- keeping what is spoken


def _fits(utterance: PlannedUtterance, group: VoiceGroup) -> bool:
    """Returns whether the group could have planned this utterance, whatever its text is."""
    return (
        (utterance.role, utterance.split) == (_role(group), group.split)
        and utterance.voice in group.voices
        and group.rate[0] - _ROUNDING <= utterance.rate <= group.rate[1] + _ROUNDING
        and group.pitch[0] - _ROUNDING <= utterance.pitch <= group.pitch[1] + _ROUNDING
    )


def _keep_sentences(planned: list[PlannedUtterance], usable: list[PlannedUtterance]) -> list[PlannedUtterance]:
    """Replaces planned sentences by spoken ones of the same voice, except where the text is new.

    The spoken sentence may have another text than the planned sentence that it replaces. This text must be the text of
    some sentence in `planned`, of any voice. A text that no usable utterance has is new. New texts are spoken as often
    as they are planned.
    """
    texts, spoken_texts = {utterance.text for utterance in planned}, {utterance.text for utterance in usable}
    exact = set(planned) & set(usable)
    remaining: dict[str, list[PlannedUtterance]] = {}
    for utterance in reversed(usable):
        if utterance not in exact and utterance.text in texts:
            remaining.setdefault(utterance.voice, []).append(utterance)
    return [
        remaining[utterance.voice].pop()
        if utterance not in exact and utterance.text in spoken_texts and remaining.get(utterance.voice)
        else utterance
        for utterance in planned
    ]


def _keep_words(planned: list[PlannedUtterance], usable: list[PlannedUtterance]) -> list[PlannedUtterance]:
    """Replaces planned utterances of single words by spoken ones of the same voice.

    Each voice still says each word as often as planned. Words that the spoken utterances lack are planned anew. If they
    do not fill the last utterance of a voice, other words of the voice's plan fill it up, and are said once more.
    """
    by_voice: dict[str, list[PlannedUtterance]] = {}
    for utterance in planned:
        by_voice.setdefault(utterance.voice, []).append(utterance)
    kept = {
        voice: _keep_words_of_voice(utterances, [utterance for utterance in usable if utterance.voice == voice])
        for voice, utterances in by_voice.items()
    }
    longest = max(map(len, kept.values()), default=0)
    return [utterances[i] for i in range(longest) for utterances in kept.values() if i < len(utterances)]


def _keep_words_of_voice(planned: list[PlannedUtterance], usable: list[PlannedUtterance]) -> list[PlannedUtterance]:
    exact = set(planned) & set(usable)
    changed = [utterance for utterance in planned if utterance not in exact]
    kept = [utterance for utterance in planned if utterance in exact]
    wanted = _count_words(planned)
    wanted -= _count_words(kept)
    for utterance in [*(utterance for utterance in usable if utterance not in exact), *changed]:
        words = _count_words([utterance])
        if words <= wanted:
            kept.append(utterance)
            wanted -= words
    missing = []
    while wanted:
        missing += list(wanted)  # each word once before any word twice
        wanted -= Counter(list(wanted))
    said = [word for utterance in planned for word in utterance.text.split() if word not in missing]
    for number, first in enumerate(range(0, len(missing), WORDS_PER_UTTERANCE)):
        words = missing[first : first + WORDS_PER_UTTERANCE]
        words += said[: WORDS_PER_UTTERANCE - len(words)]
        kept.append(replace(changed[number], text=" ".join(words)))
    return kept


def _count_words(utterances: Sequence[PlannedUtterance]) -> Counter[str]:
    return Counter(word for utterance in utterances for word in utterance.text.split())
