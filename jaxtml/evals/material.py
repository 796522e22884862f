"""What the first task is judged on: sessions with voices that training never hears, each made from (seed, number).

- **synthetic**: the two-channel mixer of training (rooms, noise, telephone bands, hesitations, barge-ins, coughs) over
  the bank's split "test". Its engines take turns, and within each its voices: all engines count the same, although most
  voices are eSpeak's. Every tenth session is silent.
- **human**: Asterisk's recorded prompts, see `jaxtml.data.talks.recorded_prompts`.

Called by `jaxtml.evals.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxtml.data.bank import Bank
from jaxtml.data.talks import recorded_prompts
from jaxtml.data.talks.mix import make_conversation
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.stream.conversation import Conversation

SEED = 20_000  # far from any seed of training
SILENT_EVERY = 10


@dataclass(frozen=True)
class EvaluationTalk:
    """One session to be held: its name, its set, who speaks, and how to make it."""

    id: str
    set: str
    voice: str
    make: Callable[[], Conversation]


def synthetic(bank: Bank, count: int, turns: int) -> list[EvaluationTalk]:
    """`count` sessions of `turns` micro-turns with the voices of the bank's split "test".

    Raises:
      InputError: the bank has none yet.
    """
    speakers = Speakers.of(bank, "test")
    voices = _in_turn(sorted(speakers.by_voice), count)
    items = []
    for number in range(count):
        silent = number % SILENT_EVERY == SILENT_EVERY - 1
        voice = voices[number - number // SILENT_EVERY]
        alone = replace(speakers, engines={voice.split(":")[0]: (voice,)})
        weights = ScenarioWeights(silence=1.0 if silent else 0.0, typed=0.0, nonsense=0.0)

        def make(number: int = number, alone: Speakers = alone, weights: ScenarioWeights = weights) -> Conversation:
            return make_conversation(np.random.default_rng((SEED, number)), alone, weights, turns)

        items.append(EvaluationTalk(f"synthetic-{number:04}", "synthetic", "nobody" if silent else voice, make))
    return items


def _in_turn(voices: Sequence[str], count: int) -> list[str]:
    """The voices of `count` sessions: engine after engine, and each engine's voices one after the other."""
    engines: dict[str, list[str]] = {}
    for voice in voices:
        engines.setdefault(voice.partition(":")[0], []).append(voice)
    groups = list(engines.values())
    chosen = []
    for number in range(count):
        round_, group = divmod(number, len(groups))
        chosen.append(groups[group][round_ % len(groups[group])])
    return chosen


def spoken_by_a_person(prompts: recorded_prompts.Prompts, count: int) -> list[EvaluationTalk]:
    """`count` sessions of recorded prompts, kinds in turn."""
    items = []
    for number in range(count):
        kind = recorded_prompts.KINDS[number % len(recorded_prompts.KINDS)]

        def make(number: int = number, kind: tuple[str, str] = kind) -> Conversation:
            return recorded_prompts.make_prompted_conversation(np.random.default_rng((SEED, number)), prompts, kind)

        items.append(
            EvaluationTalk(
                f"human-{number:04}", "human", "nobody" if kind[0] == "silence" else recorded_prompts.VOICE, make
            )
        )
    return items
