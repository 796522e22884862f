"""The record of one evaluated session, as times and words, and its JSON.

Every metric is computed from these records alone. A finished evaluation can therefore be scored again, and a single
figure can be followed back to its sessions. `jaxtml.evals.observation` makes the records, and `jaxtml.evals.run` writes
them to `items.jsonl`. Field names are keys of that file: keep them.

All times are seconds on the clock of the recording.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtml.stream.conversation import Word


@dataclass(frozen=True)
class ObservedUserTurn:
    """One user turn.

    Attributes:
      start_s: acoustic start of the first word.
      end_s: acoustic end of the last word.
      scene: the scenario of `jaxtml.data.talks.mix.SCENARIOS` that the turn belongs to.
      intent: see `jaxtml.evals.observation.intent_of`.
      expected: the right reply; "" where the words are no sentence of the short-answer task, and no reply is judged.
      words: the words that the user said, with their times.
      pauses: `(start_s, end_s)` of every long gap between two words (`jaxtml.evals.observation.PAUSE_S`).
    """

    start_s: float
    end_s: float
    scene: str
    intent: str
    expected: str
    words: tuple[Word, ...]
    pauses: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class HeardWord:
    """A word of the model's transcript.

    Attributes:
      text: the word.
      at_s: when the word was complete.
    """

    text: str
    at_s: float


@dataclass(frozen=True)
class Stretch:
    """A stretch of the model's speech: consecutive micro-turns (200 ms each) in which the model's gate is open.

    Attributes:
      open_s: when the user begins to hear the sound of the first of these micro-turns.
      close_s: when the sound of the last of these micro-turns ends.
      first_s: first audible sample; None where nothing is audible.
      last_s: end of the last audible sound, including sound that rings out in the micro-turn after the stretch.
      text: the model's own text for the speech.
      understood: the judge's transcript of the sound; None where the judge was not asked.
    """

    open_s: float
    close_s: float
    first_s: float | None
    last_s: float | None
    text: str
    understood: str | None = None


@dataclass(frozen=True)
class ObservedSession:
    """One evaluated session.

    Attributes:
      id: the session's name, "SET-NUMBER".
      set: "synthetic" or "human".
      voice: whose voice the user has.
      seconds: length of the recording.
      turns: the user turns.
      heard: the model's transcript of the user.
      stretches: the model's speech.
      step_ms: median time to compute a micro-turn, for the whole batch in which the session ran.
    """

    id: str
    set: str
    voice: str
    seconds: float
    turns: tuple[ObservedUserTurn, ...]
    heard: tuple[HeardWord, ...]
    stretches: tuple[Stretch, ...]
    step_ms: float

    def with_transcripts(self, texts: dict[int, str]) -> ObservedSession:
        """Returns the record with the judge's transcripts of some stretches, by the stretches' indices."""
        stretches = [
            replace(stretch, understood=texts.get(number, stretch.understood))
            for number, stretch in enumerate(self.stretches)
        ]
        return replace(self, stretches=tuple(stretches))


def to_json(session: ObservedSession) -> dict[str, Any]:
    """Returns the record as a JSON object."""
    return asdict(session)


def from_json(row: dict[str, Any]) -> ObservedSession:
    """Returns the record of a JSON object from `to_json`."""
    turns = [
        {**turn, "words": tuple(Word(**word) for word in turn["words"]), "pauses": tuple(map(tuple, turn["pauses"]))}
        for turn in row["turns"]
    ]
    return ObservedSession(
        **{
            **row,
            "turns": tuple(ObservedUserTurn(**turn) for turn in turns),
            "heard": tuple(HeardWord(**word) for word in row["heard"]),
            "stretches": tuple(Stretch(**stretch) for stretch in row["stretches"]),
        }
    )
