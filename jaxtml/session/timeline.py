"""A session on the console: one line per micro-turn (200 ms), while the session runs. Called by `jaxtml converse`."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from jaxtml.session.records import MicroTurn

_console = Console(highlight=False)


def print_micro_turn(micro_turn: MicroTurn) -> None:
    """Prints the clock, whether the model speaks, the time of the step, and what it heard, says and delegates."""
    speaking = micro_turn.gate == "speak"
    line = Text(f"{micro_turn.t_ms / 1000:7.1f} s  ")
    line.append("■ speak  " if speaking else "· listen ", style="bold red" if speaking else "dim")
    line.append(f"{micro_turn.step_ms:5.0f} ms  ", style="dim")
    if micro_turn.heard:
        line.append(f"heard: {micro_turn.heard.strip()}  ", style="cyan")
    if micro_turn.text:
        line.append(f"says: {micro_turn.text.strip()}  ", style="red")
    if micro_turn.delegate:
        line.append(f"delegates: {micro_turn.delegate.strip()}", style="magenta")
    _console.print(line)
