"""The metrics of the short-answer task (`jaxtml.data.tasks.scenarios`), with intervals and thresholds. Pure.

They are computed from session records only. A micro-turn is 200 ms, the unit in which the model works. In each
micro-turn the model's gate is open (it speaks) or closed (it listens). A stretch is a run of micro-turns with an open
gate.

| metric | threshold |
|---|---|
| `heard_words` | human >= 60 %, synthetic >= 85 % |
| `takes_over` | >= 85 % |
| `false_take_over_in_pauses` | <= 20 % |
| `gate_latency_s` (median) | <= 0.4 s |
| `right_to_heard` | >= 85 % |
| `own_voice_word_errors` | <= 20 % |

The other metrics have no threshold and help to explain these. Each is defined at the function that computes it.
Intervals are Wilson's (1927) at 95 %. They treat counted things as independent, although words and turns of one
session are not quite independent. Called by `jaxtml.evals.scores`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxtml.evals.outcomes import (
    TurnOutcome,
    WordOutcome,
    count_unasked,
    own_voice_errors,
    turn_outcomes,
    word_outcomes,
)
from jaxtml.evals.record import ObservedSession

# Metric name -> threshold, or metric name -> set of sessions -> threshold. `Metric.at_least` says whether the threshold
# is the least or the greatest value that meets it.
THRESHOLDS: dict[str, float | dict[str, float]] = {
    "heard_words": {"human": 0.60, "synthetic": 0.85},
    "takes_over": 0.85,
    "false_take_over_in_pauses": 0.20,
    "gate_latency_s": 0.4,
    "right_to_heard": 0.85,
    "own_voice_word_errors": 0.20,
}
STOP_S = 0.4  # a model that is interrupted should be silent after this time
_Z = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Metric:
    """One figure of one set of sessions.

    Attributes:
      name: the metric's name, as in `results.json`.
      set: "synthetic", "human", or "own voice" for the judge's baseline.
      value: a rate or a quantile; None where nothing was counted.
      low: lower end of the 95 % interval; None for quantiles.
      high: upper end.
      count: the number of hits (or errors); None for quantiles.
      of: how many things were counted, or how many values the quantile is taken from.
      threshold: the value to reach; None for no threshold.
      at_least: whether the value has to be at least the threshold; if False, at most.
    """

    name: str
    set: str
    value: float | None
    low: float | None
    high: float | None
    count: int | None
    of: int
    threshold: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the value meets the threshold; None if there is no threshold or nothing was counted."""
        if self.threshold is None or self.value is None:
            return None
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold


def to_json(metric: Metric) -> dict[str, Any]:
    """Returns a row of `results.json`. There the threshold's key is "bar", as in results of earlier versions."""
    row = {"bar" if key == "threshold" else key: value for key, value in asdict(metric).items()}
    return {**row, "met": metric.met}


def rate(name: str, set_name: str, hits: Iterable[bool], at_least: bool = True) -> Metric:
    """Returns the share of hits."""
    hits = list(hits)
    return ratio(name, set_name, sum(hits), len(hits), at_least)


def ratio(name: str, set_name: str, count: int, of: int, at_least: bool = True) -> Metric:
    """Returns `count / of`.

    There is no interval where `count` exceeds `of`: a transcript may have more errors than the text has words.
    """
    low, high = wilson(count, of) if 0 < of >= count else (None, None)
    value = count / of if of else None
    return Metric(name, set_name, value, low, high, count, of, _threshold(name, set_name), at_least)


def quantile(name: str, set_name: str, values: Sequence[float], q: float) -> Metric:
    """Returns the quantile `q` in [0, 1] of some values."""
    value = float(np.quantile(values, q)) if len(values) else None
    return Metric(name, set_name, value, None, None, None, len(values), _threshold(name, set_name), at_least=False)


def wilson(count: int, of: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a rate (Wilson 1927); `of` > 0."""
    p, z2 = count / of, _Z * _Z
    middle = (p + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(p * (1 - p) / of + z2 / (4 * of * of))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _threshold(name: str, set_name: str) -> float | None:
    threshold = THRESHOLDS.get(name)
    return threshold.get(set_name) if isinstance(threshold, dict) else threshold


def metrics_of_set(sessions: Sequence[ObservedSession], set_name: str) -> list[Metric]:
    """Returns every metric of one set of sessions."""
    outcomes = [outcome for session in sessions for outcome in turn_outcomes(session)]
    errors, words = own_voice_errors(sessions)
    return [
        *_hearing(sessions, set_name),
        *_turn_taking(outcomes, set_name),
        *_answers(outcomes, set_name),
        *_interruptions(outcomes, set_name),
        *_silence(sessions, set_name),
        # Wrong, missing and added words in the judge's transcript, per word of the text that the model spoke. Stretches
        # that the user interrupted are left out.
        ratio("own_voice_word_errors", set_name, errors, words, at_least=False),
    ]


def _hearing(sessions: Sequence[ObservedSession], set_name: str) -> list[Metric]:
    """What the model heard.

    - `heard_words`: of all words that the user said, the share that the model transcribed right. Every word of the user
      belongs to the vocabulary of the short-answer task.
    - `inserted_words`: words that the model transcribed and the user did not say, per word that the user said.
    """
    words: list[WordOutcome] = []
    inserted = 0
    for session in sessions:
        of_session, extra = word_outcomes(session)
        words += of_session
        inserted += extra
    return [
        rate("heard_words", set_name, (word.true == word.heard for word in words)),
        ratio("inserted_words", set_name, inserted, len(words)),
    ]


def _turn_taking(outcomes: Sequence[TurnOutcome], set_name: str) -> list[Metric]:
    """When the model speaks.

    - `takes_over`: user turns after which the gate opened within `[0, 1.6 s]` and before the user spoke again.
    - `false_take_over_in_pauses`: of all pauses of 0.38 s and more inside user turns, the pauses in which the gate
      opened, see `TurnOutcome.broken`.
    - `cuts_in`: user turns in which the gate opened before their end. `gate_latency_s` leaves such openings out.
    - `gate_latency_s`: time from the user's acoustic end to the first audible sample of the reply, over the turns that
      the model took over.
    - `gate_opens_s`: time from the user's acoustic end to the end of the micro-turn in which the gate opened. Replies
      without audible sound count too.
    """
    judged = [o for o in outcomes if o.turn.expected]
    latencies = [o.voice_s for o in judged if o.voice_s is not None]
    return [
        rate("takes_over", set_name, (o.reply is not None for o in judged)),
        rate("false_take_over_in_pauses", set_name, (b for o in outcomes for b in o.broken), at_least=False),
        rate("cuts_in", set_name, (o.cut_in for o in outcomes), at_least=False),
        quantile("gate_latency_s", set_name, latencies, 0.5),
        quantile("gate_latency_s p90", set_name, latencies, 0.9),
        quantile("gate_opens_s", set_name, [o.gate_s for o in judged if o.gate_s is not None], 0.5),
    ]


def _answers(outcomes: Sequence[TurnOutcome], set_name: str) -> list[Metric]:
    """What the model answers. Turns whose reply was interrupted are left out.

    - `right_to_heard`: replies that are right for the words that the model itself had heard of the turn when the gate
      opened (`jaxtml.data.tasks.scenarios.reply_to`). A reply after hearing nothing is wrong.
    - `right_to_heard_sentence`: the same, over the replies to heard words that are a sentence of the short-answer task.
    - `right_to_said`: user turns answered with the right text for the words that the user really said. A turn that the
      model did not take over is wrong.
    """
    finished = [o for o in outcomes if o.turn.expected and not o.interrupted]
    replied = [o for o in finished if o.reply]
    return [
        rate("right_to_heard", set_name, (o.right_to_heard for o in replied)),
        rate("right_to_heard_sentence", set_name, (o.right_to_heard for o in replied if o.heard_a_sentence)),
        rate("right_to_said", set_name, (o.right_to_said for o in finished)),
    ]


def _interruptions(outcomes: Sequence[TurnOutcome], set_name: str) -> list[Metric]:
    """How fast the model stops when the user begins to talk while the model is audible.

    - `stop_s`: time until the model's last audible sample.
    """
    stops = [o.stop_s for o in outcomes if o.stop_s is not None]
    return [
        quantile("stop_s", set_name, stops, 0.5),
        quantile("stop_s p90", set_name, stops, 0.9),
        rate(f"stops within {STOP_S} s", set_name, (stop_s <= STOP_S for stop_s in stops)),
    ]


def _silence(sessions: Sequence[ObservedSession], set_name: str) -> list[Metric]:
    """Whether the model stays silent where no user turn asks for a reply.

    - `silence_kept`: of the sessions without a user turn, those in which the gate never opens.
    - `unasked_per_minute`: openings of the gate that neither are a reply nor lie inside a user turn.
    """
    silent = [session for session in sessions if not session.turns]
    minutes = sum(session.seconds for session in sessions) / 60
    unasked = sum(count_unasked(session) for session in sessions)
    return [
        rate("silence_kept", set_name, (not session.stretches for session in silent)),
        quantile("unasked_per_minute", set_name, [unasked / minutes] if minutes else [], 0.5),
    ]
