"""The sessions that a model is evaluated on, with voices that training never hears. Each is made from (seed, number).

- **synthetic**: made by the mixer that also makes the training sessions (rooms, noise, telephone bands, hesitations,
  barge-ins, coughs). The voices are those of the split "test" of the bank of synthesised speech. The speech
  synthesisers (engines) take turns from session to session, and so do the voices of each engine. So all
  engines have about the same number of sessions, although most voices are eSpeak's. Every tenth session is silent.
- **people**: the same with the held-out characters of a game, recorded people (`jaxtml.data.recordings`). Their user
  turns are joined from words of the task that were cut from fluent speech. Such words are slurred: short and half
  swallowed.
- **overheard**: sessions in which those people say whole lines to each other. The right answer is silence.
- **human**: a person's recorded prompts (Asterisk), see `jaxtml.data.talks.recorded_prompts`.

Called by `tools/evaluate.py`. `jaxtml.evals.run` runs the model on the sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxtml.data.bank import Bank
from jaxtml.data.recordings import amazon_queen
from jaxtml.data.talks import recorded_prompts
from jaxtml.data.talks.mix import make_conversation
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Conversation

SEED = 20_000  # far from any seed of training
SILENT_EVERY = 10
OVERHEARD_EVERY = 4


@dataclass(frozen=True)
class EvaluationTalk:
    """One session in which the model is evaluated.

    Attributes:
      id: the session's name, "SET-NUMBER".
      set: "synthetic", "people", "overheard" or "human".
      voice: whose voice the user has; "nobody" for a silent session.
      make: makes the conversation. Every call gives the same one.
    """

    id: str
    set: str
    voice: str
    make: Callable[[], Conversation]


def synthetic_talks(bank: Bank, count: int, turns: int) -> list[EvaluationTalk]:
    """Returns `count` sessions of `turns` micro-turns (200 ms each) with the voices of the bank's split "test".

    Raises:
      InputError: the bank has no such voices yet.
    """
    speakers = replace(Speakers.of(bank, "test"), lines={})
    voices = _voices_in_turn(sorted(speakers.by_voice), count)
    talks = []
    for number in range(count):
        silent = number % SILENT_EVERY == SILENT_EVERY - 1
        voice = voices[number - number // SILENT_EVERY]
        one_voice = replace(speakers, engines={voice.split(":")[0]: (voice,)})
        weights = ScenarioWeights(
            silence=1.0 if silent else 0.0, typed=0.0, nonsense=0.0, reshaped=0.0, hard_channel=0.0
        )

        def make(
            number: int = number, speakers: Speakers = one_voice, weights: ScenarioWeights = weights
        ) -> Conversation:
            return make_conversation(np.random.default_rng((SEED, number)), speakers, weights, turns)

        talks.append(EvaluationTalk(f"synthetic-{number:04}", "synthetic", "nobody" if silent else voice, make))
    return talks


def people_talks(bank: Bank, count: int, turns: int) -> list[EvaluationTalk]:
    """Returns `count` sessions of `turns` micro-turns with recorded people of the bank's split "test".

    The people take turns. In every fourth session they are overheard.

    Raises:
      InputError: the bank has no recorded people.
    """
    speakers = Speakers.of(bank, "test")
    voices = sorted(speakers.texts)
    if not voices:
        raise InputError(f"{bank.folder} has no recorded people: {amazon_queen.INSTALL}, and run `jaxtml data` again")
    talks = []
    for number in range(count):
        is_overheard = number % OVERHEARD_EVERY == OVERHEARD_EVERY - 1
        voice = voices[number % len(voices)]
        one_voice = replace(
            speakers,
            engines={amazon_queen.ENGINE: (voice,)},
            lines={name: lines for name, lines in speakers.lines.items() if is_overheard},
        )
        weights = ScenarioWeights(
            silence=1.0 if is_overheard else 0.0, overheard=1.0, typed=0.0, reshaped=0.0, hard_channel=0.0
        )

        def make(
            number: int = number, speakers: Speakers = one_voice, weights: ScenarioWeights = weights
        ) -> Conversation:
            return make_conversation(np.random.default_rng((SEED, 1, number)), speakers, weights, turns)

        name = "overheard" if is_overheard else "people"
        talks.append(EvaluationTalk(f"{name}-{number:04}", name, "nobody" if is_overheard else voice, make))
    return talks


def _voices_in_turn(voices: Sequence[str], count: int) -> list[str]:
    """Returns the voice of each session. The engine changes from session to session; each engine cycles its voices."""
    engines: dict[str, list[str]] = {}
    for voice in voices:
        engines.setdefault(voice.partition(":")[0], []).append(voice)
    groups = list(engines.values())
    chosen = []
    for number in range(count):
        round_, group = divmod(number, len(groups))
        chosen.append(groups[group][round_ % len(groups[group])])
    return chosen


def human_talks(prompts: recorded_prompts.Prompts, count: int) -> list[EvaluationTalk]:
    """Returns `count` sessions of recorded prompts. They cycle through the kinds of session."""
    talks = []
    for number in range(count):
        kind = recorded_prompts.KINDS[number % len(recorded_prompts.KINDS)]

        def make(number: int = number, kind: tuple[str, str] = kind) -> Conversation:
            return recorded_prompts.make_prompted_conversation(np.random.default_rng((SEED, number)), prompts, kind)

        voice = "nobody" if kind[0] == "silence" else recorded_prompts.VOICE
        talks.append(EvaluationTalk(f"human-{number:04}", "human", voice, make))
    return talks
