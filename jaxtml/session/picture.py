"""`draw`: a session as a picture of its timeline. Called by `jaxtml converse --picture`.

Axis: N samples at 16 kHz.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxtml.session.records import Reply
from jaxtml.stream.timebase import SAMPLE_RATE

_WORDS: Any = {"fontsize": 9, "parse_math": False}  # a text with two dollar signs would be read as a formula

WIDEST_INCHES = 160.0
"""Width of the picture of a session of two minutes. Longer sessions are squeezed into this width."""

PICTURE_ENDINGS = (".png", ".svg", ".pdf", ".jpg", ".jpeg")
"""The endings of names for `draw`. Matplotlib writes each of them without another program, at any width."""

USER_COLOUR, MODEL_COLOUR, STEP_COLOUR = "#33658a", "#bc4b51", "#7a7a7a"


def draw(path: str | Path, wave: np.ndarray, reply: Reply) -> None:
    """Writes a picture of the session to `path`, in the format that the name promises; without an ending a PNG.

    It shows both voices on a grid of micro-turns (200 ms each), what was heard and said, when the model spoke, and the
    time per step. `wave` `[N]` float32 is the user's recording.
    """
    from matplotlib.figure import Figure

    seconds = len(wave) / SAMPLE_RATE
    width = min(max(9.0, seconds * 1.3), WIDEST_INCHES)
    # Not through pyplot: pyplot keeps figures, and chooses a backend, for the whole process.
    figure = Figure(figsize=(width, 6.0), layout="constrained")
    user, model, steps = axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 1])
    clock = np.arange(len(wave)) / SAMPLE_RATE
    for axis, sound, name, colour in ((user, wave, "user", USER_COLOUR), (model, reply.wave, "model", MODEL_COLOUR)):
        axis.plot(clock, sound, linewidth=0.4, color=colour)
        axis.set_ylabel(name)
        axis.set_ylim(-1.4, 1.4)
        axis.set_yticks([])
    for micro_turn in reply.turns:
        start = micro_turn.t_ms / 1000
        if micro_turn.heard:
            user.text(start + 0.2, 1.05, micro_turn.heard.strip(), color=USER_COLOUR, **_WORDS)
        if micro_turn.text:
            model.text(start + 0.2, 1.05, micro_turn.text.strip(), color=MODEL_COLOUR, **_WORDS)
        if micro_turn.gate == "speak":
            model.axvspan(start + 0.2, start + 0.4, color=MODEL_COLOUR, alpha=0.12, linewidth=0)
    starts = np.array([micro_turn.t_ms for micro_turn in reply.turns]) / 1000
    steps.bar(starts, [micro_turn.step_ms for micro_turn in reply.turns], width=0.18, align="edge", color=STEP_COLOUR)
    steps.set_ylabel("step, ms")
    steps.set_xlabel("seconds; each word stands at the end of its 200 ms; shaded: the model speaks")
    user.set_xlim(0, seconds)
    for axis in axes if width < WIDEST_INCHES else ():  # squeezed, a micro-turn is too narrow for a line
        axis.set_xticks(np.arange(0, seconds, 0.2), minor=True)
        axis.grid(which="minor", axis="x", alpha=0.25)
    figure.savefig(path, dpi=110, format=Path(path).suffix[1:].lower() or "png")
