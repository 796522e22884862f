"""The exception for bad input, and how an error message lists many names.

Everything that checks what a user gave raises `InputError`: files, options, configs, checkpoints. The command line
turns the error into one line on stderr and exit status 2 (`jaxtml.commands.arguments.exit_status`).
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_NAMED = 5
"""How many names `join_names` lists."""


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, and what to do about it."""


def join_names(names: Sequence[str]) -> str:
    """Returns the first `MOST_NAMED` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
