"""Argument types and exit statuses that the commands and the tools share.

The tools in `tools/` call `tool_parser` and `run_tool`. So each of them prints help with an example, and ends on bad
input with one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxtml.errors import InputError


def count(text: str) -> int:
    """An argument type: a whole number, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give at least 1")
    return value


def amount(text: str) -> float:
    """An argument type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def tool_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """Returns the parser of a tool. `description` is the tool's docstring, `example` a command line that works."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_tool(parser: argparse.ArgumentParser, tool: Callable[[argparse.Namespace], int | None]) -> NoReturn:
    """Parses the command line, calls `tool` with the arguments, and exits with the status that `tool` returns.

    None is status 0. Bad input and files that cannot be used are one line on stderr and status 2.
    """
    args = parser.parse_args()
    try:
        status = tool(args)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        status = 130
    sys.exit(status or 0)
