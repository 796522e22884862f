"""The help of commands and tools: each option is explained, each number has a unit, and each default is named."""

from __future__ import annotations

import argparse
import runpy
import sys

import pytest

from jaxtml.commands import arguments
from jaxtml.commands.main import COMMANDS, parser
from tests.commands.documented import TOOLS

TIMES_AND_SIZES = {"seconds", "minutes", "gigabytes", "megabytes", "bytes", "micro-turns"}
THINGS = {"steps", "hosts", "processes", "threads", "sessions", "clients", "starts", "port", "seed", "examples", "rows"}
UNITS = {*TIMES_AND_SIZES, *THINGS, "hours", "share", "tokens", "conversations"}
UNITS |= {"sentences", "utterances", "pairs", "repetitions"}
"""What a number counts. A word of the option's name, or of its help, has to be one of these."""


def options_of(program: str, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """Returns the arguments of a command or a tool, without those of absl and argparse."""
    if program in COMMANDS:
        (choices,) = (action.choices for action in parser()._actions if action.dest == "command")
        found = choices[program]
    else:
        parsers = []
        monkeypatch.setattr(arguments, "run_tool", lambda parser, work: parsers.append(parser))
        monkeypatch.setattr(sys, "argv", [program])
        runpy.run_path(str(TOOLS[program]), run_name="__main__")
        (found,) = parsers
    return [action for action in found._actions if action.default is not argparse.SUPPRESS]


def is_number(action: argparse.Action) -> bool:
    """Returns whether an option takes a number: whether its type reads one."""
    if not callable(action.type):
        return False
    try:
        return isinstance(action.type("3"), int | float)
    except (ValueError, OSError, argparse.ArgumentTypeError):
        return False


@pytest.mark.parametrize("program", [*COMMANDS, *TOOLS])
def test_every_option_says_what_it_is_its_unit_and_its_default(program, monkeypatch):
    options = options_of(program, monkeypatch)
    assert options
    for option in options:
        name = (option.option_strings or [option.dest])[-1]
        help = option.help or ""
        assert len(help) > 10, f"{program} {name} has no help"
        if is_number(option):
            words = {*name.strip("-").split("-"), *help.replace(",", " ").replace(";", " ").split()}
            assert words & UNITS, f"{program} {name}: {help!r} names no unit"
        optional = option.option_strings and not option.required
        if optional and (is_number(option) or option.default not in (None, False, "", [], ())):
            assert "default" in help, f"{program} {name}: {help!r} names no default"
