"""The figures of the first task and the bars they are held to, from session records alone. Pure.

| figure | bar |
|---|---|
| `heard_words` | human >= 60 %, synthetic >= 85 % |
| `takes_over` | >= 85 % |
| `false_take_over_in_pauses` | <= 20 % |
| `gate_latency_s` (median) | <= 0.4 s |
| `right_to_heard` | >= 85 % |
| `own_voice_word_errors` | <= 20 % |

The others have no bar and are there to explain these. Each is defined at the function that counts it. Intervals are
Wilson's (1927) at 95 % and treat counted things as independent, which words and turns of one session are not quite.
Called by `jaxtml.evals.run`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxtml.evals import judge
from jaxtml.evals.events import ObservedSession, ObservedUserTurn
from jaxtml.evals.outcomes import Outcome, listener_errors, outcomes, unasked, uninterrupted, word_results

_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Row:
    """One figure: a rate with `count` of `of` and its 95 % interval, or (`count` None) a quantile of `of` values."""

    name: str
    set: str
    value: float | None
    low: float | None
    high: float | None
    count: int | None
    of: int
    bar: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """None: there is no bar, or nothing was counted."""
        if self.bar is None or self.value is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "met": row.met}


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % score interval of a rate (Wilson 1927); `of` > 0."""
    p, z2 = count / of, _Z * _Z
    middle = (p + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(p * (1 - p) / of + z2 / (4 * of * of))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def rate(name: str, set_name: str, hits: Iterable[bool], bar: float | None = None, at_least: bool = True) -> Row:
    hits = list(hits)
    return counted(name, set_name, sum(hits), len(hits), bar, at_least)


def counted(name: str, set_name: str, count: int, of: int, bar: float | None = None, at_least: bool = True) -> Row:
    low, high = wilson(count, of) if 0 < of >= count else (None, None)  # errors may be more than the words
    return Row(name, set_name, count / of if of else None, low, high, count, of, bar, at_least)


def quantile(name: str, set_name: str, values: Sequence[float], q: float, bar: float | None = None) -> Row:
    value = float(np.quantile(values, q)) if len(values) else None
    return Row(name, set_name, value, None, None, None, len(values), bar, at_least=False)


# --- all sessions of a set


def rows_of(sessions: Sequence[ObservedSession], set_name: str) -> list[Row]:
    """Every figure of one set.

    - `heard_words`: true words written down right, of all true words (every word of the user's is of the task's
      vocabulary). `inserted_words`: words written down that nobody said, per true word.
    - `takes_over`: turns after which the gate opened within `[0, 1.6 s]` and before the user spoke again.
    - `false_take_over_in_pauses`: pauses of 0.38 s and more inside a turn in which the gate opened, see
      `Outcome.broken`. `cuts_in`: turns in which it opened anywhere before their end: the negative latencies.
    - `gate_latency_s`: from the user's acoustic end to the first audible sample of the reply, over the take-overs;
      `gate_opens_s`: to the micro-turn's edge at which the gate opened, audible or not.
    - `right_to_heard`: of the replies that the user let finish, those whose text is `reply_to` what the model itself
      had heard of that turn when it opened; having heard nothing is wrong. `right_to_heard_sentence`: the same where
      what it had heard is a sentence of the task. `right_to_said`: turns answered with the right text for what the user
      really said, no take-over being wrong; turns whose reply was interrupted are out.
    - `stop_s`: the user begins to talk while the model is audible: time until its last audible sample.
    - `silence_kept`: sessions without speech in which the gate never opens. `unasked_per_minute`: openings that are
      neither a reply nor inside a turn.
    - `own_voice_word_errors`: wrong, missing and added words of the independent listener per word of the said text,
      over stretches that the user did not interrupt.
    """
    results, inserted = [], 0
    for session in sessions:
        words, extra = word_results(session)
        results += words
        inserted += extra
    turns = [outcome for session in sessions for outcome in outcomes(session)]
    judged = [o for o in turns if o.turn.expected]
    voices = [o.voice_s for o in judged if o.voice_s is not None]
    stops = [o.stop_s for o in turns if o.stop_s is not None]
    finished = [o for o in judged if not o.interrupted]
    silent = [session for session in sessions if not session.turns]
    heard_bar = {"human": 0.60, "synthetic": 0.85}.get(set_name)
    minutes = sum(session.seconds for session in sessions) / 60
    extra_openings = sum(unasked(session) for session in sessions)
    wrong, said = listener_errors(sessions)
    return [
        rate("heard_words", set_name, (word.true == word.heard for word in results), heard_bar),
        counted("inserted_words", set_name, inserted, len(results)),
        rate("takes_over", set_name, (o.reply is not None for o in judged), 0.85),
        rate("false_take_over_in_pauses", set_name, (b for o in turns for b in o.broken), 0.20, at_least=False),
        rate("cuts_in", set_name, (o.cut_in for o in turns), at_least=False),
        quantile("gate_latency_s", set_name, voices, 0.5, 0.4),
        quantile("gate_latency_s p90", set_name, voices, 0.9),
        quantile("gate_opens_s", set_name, [o.gate_s for o in judged if o.gate_s is not None], 0.5),
        rate("right_to_heard", set_name, (o.right_to_heard for o in finished if o.reply), 0.85),
        rate(
            "right_to_heard_sentence", set_name, (o.right_to_heard for o in finished if o.reply and o.heard_a_sentence)
        ),
        rate("right_to_said", set_name, (o.right_to_said for o in finished)),
        quantile("stop_s", set_name, stops, 0.5),
        quantile("stop_s p90", set_name, stops, 0.9),
        rate("stops within 0.4 s", set_name, (stop <= 0.4 for stop in stops)),
        rate("silence_kept", set_name, (not session.stretches for session in silent)),
        quantile("unasked_per_minute", set_name, [extra_openings / minutes] if minutes else [], 0.5),
        counted("own_voice_word_errors", set_name, wrong, said, 0.20, at_least=False),
    ]


# --- where it fails


def breakdown(
    sessions: Sequence[ObservedSession], key: Callable[[ObservedSession, ObservedUserTurn], str]
) -> dict[str, dict[str, Any]]:
    """The main rates by a property of the turn (its intent, its voice ...), as `{group: {figure: [rate, of]}}`."""
    words: dict[str, list[bool]] = defaultdict(list)
    turns: dict[str, list[Outcome]] = defaultdict(list)
    errors: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for session in sessions:
        results, _ = word_results(session)
        groups = [key(session, turn) for turn in session.turns for _ in turn.words]
        for group, word in zip(groups, results, strict=True):
            words[group].append(word.true == word.heard)
        for outcome in outcomes(session):
            turns[key(session, outcome.turn)].append(outcome)
        for n in uninterrupted(session):
            stretch = session.stretches[n]
            before = [turn for turn in session.turns if turn.start_s <= stretch.open_s]
            if before and stretch.understood is not None:
                errors[key(session, before[-1])].append(judge.errors(stretch.text, stretch.understood))

    def share(hits: Iterable[bool]) -> list[float | int | None]:
        hits = list(hits)
        return [round(sum(hits) / len(hits), 4) if hits else None, len(hits)]

    table = {}
    for group in sorted(turns):
        judged = [o for o in turns[group] if o.turn.expected]
        finished = [o for o in judged if not o.interrupted]
        wrong, said = (sum(column) for column in zip(*errors[group], strict=True)) if errors[group] else (0, 0)
        table[group] = {
            "heard_words": share(words[group]),
            "takes_over": share(o.reply is not None for o in judged),
            "false_take_over_in_pauses": share(b for o in turns[group] for b in o.broken),
            "cuts_in": share(o.cut_in for o in turns[group]),
            "right_to_heard": share(o.right_to_heard for o in finished if o.reply),
            "right_to_said": share(o.right_to_said for o in finished),
            "own_voice_word_errors": [round(wrong / said, 4) if said else None, said],
        }
    return table


def confusions(sessions: Sequence[ObservedSession]) -> dict[str, Any]:
    """Which words go wrong: `{word: [said, right, {heard instead: count}]}`, the most errors first; "" is nothing."""
    said: Counter[str] = Counter()
    instead: dict[str, Counter[str]] = defaultdict(Counter)
    for session in sessions:
        for word in word_results(session)[0]:
            said[word.true] += 1
            if word.heard != word.true:
                instead[word.true][word.heard] += 1
    worst = sorted(instead, key=lambda word: (-instead[word].total(), word))
    return {
        word: [said[word], said[word] - instead[word].total(), dict(instead[word].most_common(4))] for word in worst
    }


def score(sessions: Sequence[ObservedSession]) -> dict[str, Any]:
    """All of it, ready for JSON: `rows`, and by set `intents`, `scenes`, `voices`, `engines` and `words`."""
    result: dict[str, Any] = {"rows": [], "sets": {}}
    for set_name in sorted({session.set for session in sessions}):
        of_set = [session for session in sessions if session.set == set_name]
        result["rows"] += [as_json(row) for row in rows_of(of_set, set_name)]
        result["sets"][set_name] = {
            "sessions": len(of_set),
            "turns": sum(len(session.turns) for session in of_set),
            "intents": breakdown(of_set, lambda session, turn: turn.intent),
            "scenes": breakdown(of_set, lambda session, turn: turn.scene),
            "engines": breakdown(of_set, lambda session, turn: session.voice.partition(":")[0]),
            "voices": breakdown(of_set, lambda session, turn: session.voice),
            "words": confusions(of_set),
        }
    return result
