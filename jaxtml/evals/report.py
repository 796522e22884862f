"""An evaluation for people: tables of the metrics and one picture. Called by `tools/evaluate.py`.

Rows and breakdowns are those of `jaxtml.evals.scores`, as in `results.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from jaxtml.evals.metrics import THRESHOLDS
from jaxtml.evals.outcomes import turn_outcomes
from jaxtml.evals.record import ObservedSession
from jaxtml.evals.scores import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Groups = Mapping[str, Mapping[str, Rate]]
"""`{group: {metric: [rate, of]}}`."""

_IN_SECONDS = ("gate_latency_s", "gate_latency_s p90", "gate_opens_s", "stop_s", "stop_s p90")
_BREAKDOWN_METRICS = (
    "heard_words",
    "takes_over",
    "cuts_in",
    "right_to_heard",
    "right_to_said",
    "own_voice_word_errors",
)
_CHART_METRICS = ("heard_words", "takes_over", "right_to_said")


def metrics_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table of every metric with its interval, its threshold, and whether the threshold is met."""
    table = Table("set", "metric", "value", "95 % interval", "of", "threshold", "met")
    for row in rows:
        interval = f"{_percent(row['low'])} - {_percent(row['high'])}" if row["low"] is not None else ""
        sign = ">=" if row["at_least"] else "<="
        threshold = "" if row["bar"] is None else f"{sign} {_value({**row, 'value': row['bar']})}"
        met = {True: "yes", False: "[red]no[/red]", None: ""}[row["met"]]
        table.add_row(row["set"], row["name"], _value(row), interval, str(row["of"]), threshold, met)
    return table


def breakdown_table(title: str, groups: Groups) -> Table:
    """Returns a table of the main rates by intent, voice or scene, with the number counted in brackets."""
    table = Table(title, *_BREAKDOWN_METRICS)
    for group, rates in groups.items():
        table.add_row(group, *(f"{_percent(rates[name][0])} ({rates[name][1]})" for name in _BREAKDOWN_METRICS))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _value(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "-"
    if row["name"] in _IN_SECONDS:
        return f"{row['value']:.2f} s"
    return _percent(row["value"]) if row["count"] is not None else f"{row['value']:.2f}"


def save_picture(path: Path, sessions: Sequence[ObservedSession], scores: Mapping[str, Any], title: str) -> None:
    """Draws one row for each set: the latency of the replies, and the main rates by intent and by voice."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(scores["sets"])
    figure, axes = plt.subplots(len(sets), 3, figsize=(16, 4.5 * len(sets)), squeeze=False, layout="constrained")
    figure.suptitle(title)
    for (latency, intents, voices), name in zip(axes, sets, strict=True):
        _latency_chart(latency, [session for session in sessions if session.set == name], name)
        _rate_chart(intents, scores["sets"][name]["intents"], f"{name}: by intent")
        _rate_chart(voices, scores["sets"][name]["voices"], f"{name}: by voice")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _latency_chart(axes: Axes, sessions: Sequence[ObservedSession], set_name: str) -> None:
    """A histogram of the time from the user's end to the voice, or to the opening of the gate if nothing is audible."""
    judged = [outcome for session in sessions for outcome in turn_outcomes(session) if outcome.turn.expected]
    latencies = [o.voice_s if o.voice_s is not None else o.gate_s for o in judged]
    axes.hist([latency for latency in latencies if latency is not None], bins=np.arange(0, 1.85, 0.05).tolist())
    threshold = THRESHOLDS["gate_latency_s"]
    assert isinstance(threshold, float)
    axes.axvline(threshold, color="red", linestyle=":", label=f"threshold of the median: {threshold} s")
    replies = f"replies (to {len(judged)} user turns)"
    axes.set(title=f"{set_name}: from the user's end to the voice", xlabel="s", ylabel=replies)
    axes.legend()


def _rate_chart(axes: Axes, groups: Groups, title: str) -> None:
    """Horizontal bars of the main rates by group."""
    at = np.arange(len(groups))
    for k, name in enumerate(_CHART_METRICS):
        axes.barh(at + 0.27 * (k - 1), [100 * (rates[name][0] or 0) for rates in groups.values()], 0.25, label=name)
    axes.set_yticks(at, list(groups), fontsize=7)
    axes.set(title=title, xlim=(0, 100), xlabel="%")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
