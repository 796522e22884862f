"""The scores of an evaluation, ready for `results.json`: every metric, and where the model fails.

Called by `tools/evaluate.py`. Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxtml.evals.judge import count_errors
from jaxtml.evals.metrics import metrics_of_set, to_json
from jaxtml.evals.outcomes import TurnOutcome, turn_outcomes, uninterrupted_stretches, word_outcomes
from jaxtml.evals.record import ObservedSession, ObservedUserTurn

Rate = list[float | int | None]
"""`[rate, of]`; the rate is None where nothing was counted."""


def score(sessions: Sequence[ObservedSession]) -> dict[str, Any]:
    """Returns all scores: "rows", one for each metric, and by set "intents", "scenes", "voices", "engines", "words"."""
    result: dict[str, Any] = {"rows": [], "sets": {}}
    for set_name in sorted({session.set for session in sessions}):
        of_set = [session for session in sessions if session.set == set_name]
        result["rows"] += [to_json(metric) for metric in metrics_of_set(of_set, set_name)]
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


def breakdown(
    sessions: Sequence[ObservedSession], key: Callable[[ObservedSession, ObservedUserTurn], str]
) -> dict[str, dict[str, Rate]]:
    """Returns the main rates by a property of the user turn, as `{group: {metric: [rate, of]}}`.

    Args:
      sessions: the records.
      key: the property of a turn: its intent, its voice, ...
    """
    words: dict[str, list[bool]] = defaultdict(list)
    outcomes: dict[str, list[TurnOutcome]] = defaultdict(list)
    errors: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for session in sessions:
        groups = [key(session, turn) for turn in session.turns for _ in turn.words]
        for group, word in zip(groups, word_outcomes(session)[0], strict=True):
            words[group].append(word.true == word.heard)
        for outcome in turn_outcomes(session):
            outcomes[key(session, outcome.turn)].append(outcome)
        for number in uninterrupted_stretches(session):
            stretch = session.stretches[number]
            before = [turn for turn in session.turns if turn.start_s <= stretch.open_s]
            if before and stretch.understood is not None:
                errors[key(session, before[-1])].append(count_errors(stretch.text, stretch.understood))
    return {group: _group_rates(words[group], outcomes[group], errors[group]) for group in sorted(outcomes)}


def _group_rates(
    words: Sequence[bool], outcomes: Sequence[TurnOutcome], errors: Sequence[tuple[int, int]]
) -> dict[str, Rate]:
    """The main rates of one group; metrics are defined in `jaxtml.evals.metrics`."""
    judged = [o for o in outcomes if o.turn.expected]
    finished = [o for o in judged if not o.interrupted]
    wrong, said = (sum(column) for column in zip((0, 0), *errors, strict=True))
    return {
        "heard_words": _rate(words),
        "takes_over": _rate(o.reply is not None for o in judged),
        "false_take_over_in_pauses": _rate(b for o in outcomes for b in o.broken),
        "cuts_in": _rate(o.cut_in for o in outcomes),
        "right_to_heard": _rate(o.right_to_heard for o in finished if o.reply),
        "right_to_said": _rate(o.right_to_said for o in finished),
        "own_voice_word_errors": [round(wrong / said, 4) if said else None, said],
    }


def _rate(hits: Iterable[bool]) -> Rate:
    hits = list(hits)
    return [round(sum(hits) / len(hits), 4) if hits else None, len(hits)]


def confusions(sessions: Sequence[ObservedSession]) -> dict[str, list[Any]]:
    """Returns the words that the model misheard, the most errors first.

    The form is `{word: [times said, times right, {heard instead: count}]}`. Of the words heard instead, the four most
    frequent are listed. "" among them means that nothing was heard.
    """
    said: Counter[str] = Counter()
    instead: dict[str, Counter[str]] = defaultdict(Counter)
    for session in sessions:
        for word in word_outcomes(session)[0]:
            said[word.true] += 1
            if word.heard != word.true:
                instead[word.true][word.heard] += 1
    worst = sorted(instead, key=lambda word: (-instead[word].total(), word))
    return {
        word: [said[word], said[word] - instead[word].total(), dict(instead[word].most_common(4))] for word in worst
    }
