"""An evaluation for people: the table of figures and one picture. Called by `tools/evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxtml.evals.events import ObservedSession
from jaxtml.evals.outcomes import outcomes

_SECONDS = ("gate_latency_s", "gate_latency_s p90", "gate_opens_s", "stop_s", "stop_s p90")
_SHOWN = ("heard_words", "takes_over", "cuts_in", "right_to_heard", "right_to_said", "own_voice_word_errors")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _value(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "-"
    if row["name"] in _SECONDS:
        return f"{row['value']:.2f} s"
    return _percent(row["value"]) if row["count"] is not None else f"{row['value']:.2f}"


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Every figure with its interval, its bar and whether it is met."""
    table = Table("set", "figure", "value", "95 % interval", "of", "bar", "met")
    for row in rows:
        interval = f"{_percent(row['low'])} - {_percent(row['high'])}" if row["low"] is not None else ""
        sign = ">=" if row["at_least"] else "<="
        bar = "" if row["bar"] is None else f"{sign} {_value({**row, 'value': row['bar']})}"
        met = {True: "yes", False: "[red]no[/red]", None: ""}[row["met"]]
        table.add_row(row["set"], row["name"], _value(row), interval, str(row["of"]), bar, met)
    return table


def breakdown_table(title: str, groups: dict[str, dict[str, Any]]) -> Table:
    """The main rates by intent, voice or scene; the number counted in brackets."""
    table = Table(title, *_SHOWN)
    for group, figures in groups.items():
        table.add_row(group, *(f"{_percent(figures[name][0])} ({figures[name][1]})" for name in _SHOWN))
    return table


def picture(path: Path, sessions: Sequence[ObservedSession], score: dict[str, Any], title: str) -> None:
    """Latency of the take-overs, and heard words and right answers by intent and by voice, one row per set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(score["sets"])
    figure, axes = plt.subplots(len(sets), 3, figsize=(16, 4.5 * len(sets)), squeeze=False, layout="constrained")
    figure.suptitle(title)
    for (latency, intents, voices), name in zip(axes, sets, strict=True):
        ended = [o for s in sessions if s.set == name for o in outcomes(s) if o.turn.expected]
        values = [o.voice_s if o.voice_s is not None else o.gate_s for o in ended if o.gate_s is not None]
        latency.hist([value for value in values if value is not None], bins=np.arange(0, 1.85, 0.05).tolist())
        latency.axvline(0.4, color="red", linestyle=":", label="bar: median 0.4 s")
        latency.set(title=f"{name}: from the user's end to the voice", xlabel="s", ylabel=f"of {len(ended)} turns")
        latency.legend()
        _bars(intents, score["sets"][name]["intents"], f"{name}: by intent")
        _bars(voices, score["sets"][name]["voices"], f"{name}: by voice")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(axes: Any, groups: dict[str, dict[str, Any]], title: str) -> None:
    shown = ("heard_words", "takes_over", "right_to_said")
    at = np.arange(len(groups))
    for k, figure in enumerate(shown):
        axes.barh(at + 0.27 * (k - 1), [100 * (g[figure][0] or 0) for g in groups.values()], 0.25, label=figure)
    axes.set_yticks(at, list(groups), fontsize=7)
    axes.set(title=title, xlim=(0, 100), xlabel="%")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
