"""Arguments, checks and exit statuses that the commands and the tools share.

The commands in `jaxtml/commands/` add `--checkpoint`, CONFIG and `--set` with the functions here. The tools in `tools/`
call `tool_parser` and `run_tool`: each tool prints help with an example, and ends on bad input as a command does.

Import nothing heavy here: every command line, `jaxtml --help` included, imports this module.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jaxtml import DEMO_RECORDING
from jaxtml.checkpoint.files import SHIPPED
from jaxtml.commands.failures import explain
from jaxtml.errors import InputError

Number = TypeVar("Number", int, float)

OK, FAULT, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 130, 141  # exit statuses; 128 + the number of a signal

TRACEBACK = "JAXTML_TRACEBACK"
"""The environment variable that makes every error show its traceback. Unset, empty or 0: only faults of jaxtml do."""

_REPORT = (
    "this is a fault of jaxtml, not of your input: please report it to the project, with the lines above, the command "
    "and what `jaxtml --version` prints"
)

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

MOST_WORKERS = 32
"""Processes that "auto" starts at most. Each holds batches, or a speech engine, of hundreds of megabytes."""


def count(text: str) -> int:
    """An argument type: a whole number, at least 1."""
    value = _convert(int, "a whole number", text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give at least 1")
    return value


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Returns an argument type: a whole number from `low` to `high`."""

    def read(text: str) -> int:
        value = _convert(int, "a whole number", text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text:.60}: give a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """Returns an argument type: a number from `low` to `high`."""

    def read(text: str) -> float:
        value = _convert(float, "a number", text)
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text:.60}: give a number from {low:g} to {high:g}")
        return value

    return read


def _convert(kind: Callable[[str], Number], noun: str, text: str) -> Number:
    """Returns `kind(text)`, or raises an argument error that says "`text` is not `noun`"."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not {noun}") from None


def path_name(text: str) -> str:
    """An argument type: the name of a file or folder. An empty name comes from a shell variable that is not set.

    An address such as `gs://bucket/run` would be read as the name of a local file, or make a folder `gs:`.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty: give a file or a folder")
    if _ADDRESS.match(text):
        raise argparse.ArgumentTypeError(
            f"{text:.80} is an address, and jaxtml reads and writes files of this machine alone: "
            "copy or mount it here, and name the file or folder"
        )
    return text


def folder_name(text: str) -> str:
    """An argument type: the name of a checkpoint or run, as `path_name`. TensorStore reads names in UTF-8 alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} is not UTF-8: rename the folder, or set LC_ALL to a UTF-8 locale such as C.UTF-8"
        ) from None
    return path_name(text)


def worker_count(cores_each: int) -> Callable[[str], int]:
    """Returns an argument type: how many processes, at least 1, or "auto".

    "auto" is one process for each `cores_each` CPU cores that this process may use, and at most `MOST_WORKERS`.
    """

    def parse(text: str) -> int:
        if text != "auto":
            return count(text)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(max(1, cores // cores_each), MOST_WORKERS)

    return parse


def amount(text: str) -> float:
    """An argument type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def add_repeatable(parser: argparse.ArgumentParser, option: str, metavar: str, help: str) -> None:
    """Adds an option that may be repeated. Its value is the list of the strings given; by default the empty list."""
    parser.add_argument(option, action="append", default=[], metavar=metavar, help=f"{help}; may be repeated")


def add_config(parser: argparse.ArgumentParser, help: str = "the name of a config in configs/, or its path") -> None:
    """Adds the positional CONFIG and the repeatable option `--set A.B=C`."""
    parser.add_argument("config", type=folder_name, metavar="CONFIG", help=help)
    add_repeatable(parser, "--set", "A.B=C", "give a field of the config another value")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds `--checkpoint DIR`. The default is the checkpoint that ships with the package."""
    parser.add_argument(
        "--checkpoint",
        type=folder_name,
        default=SHIPPED,
        metavar="DIR",
        help="the directory of a checkpoint (default: the tiny model that ships with jaxtml)",
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds `--mesh AXES`, as `jaxtml serve` has it. The default is one device."""
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="the devices that share the model, for example expert=8 or expert=4,tensor=2 (default: one device)",
    )


def seed(text: str) -> int:
    """An argument type: a seed, a whole number in [0, 2**32)."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number") from None
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value}: give a number from 0 to {(1 << 32) - 1}")
    return value


def add_recording(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--recording WAV`, by default the recording that ships with the package. `what` says what is in the file."""
    parser.add_argument(
        "--recording",
        type=Path,
        default=Path(DEMO_RECORDING),
        metavar="WAV",
        help=f"{what} (default: the recording that ships with jaxtml)",
    )


def check_outputs(*paths: str | None, sources: Sequence[str | None]) -> None:
    """Checks, before the long work, that every output can be written after the work. None stands for no output.

    Raises:
      InputError: the folder of an output is missing; or an output is a folder, may not be written, is one of the
        inputs `sources`, or is named twice.
    """
    taken: list[tuple[Path, str]] = [(Path(source), "it is an input") for source in sources if source]
    for path in filter(None, paths):
        output = Path(path)
        if path == "-":
            raise InputError("cannot write -: standard output is for what the command prints; name a file")
        if output.exists() and not output.is_file() and not output.is_dir():
            continue  # a device or a pipe: nothing there is lost, and it may be named twice
        check_parent(output)
        if output.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file")
        for other, what in taken:
            if output.resolve() == other.resolve() or (output.exists() and other.exists() and output.samefile(other)):
                raise InputError(f"cannot write {path}: {what}; name another file")
        _try_writing(path, output.resolve())
        taken.append((output, "another output has the same name"))


def check_parent(output: Path) -> None:
    """Raises `InputError` if the folder of an output is missing or is a file."""
    parent = output.resolve().parent
    if parent.exists() and not parent.is_dir():
        raise InputError(f"cannot write {output}: {parent} is a file; name another folder")
    if not parent.is_dir():
        raise InputError(f"cannot write {output}: there is no folder {parent}; make it first")


def _try_writing(path: str, output: Path) -> None:
    """Raises `InputError` if no file can be made beside `output`, or if `output` may not be replaced."""
    try:  # Files are written beside their place under a longer name, and then renamed.
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.", suffix=".partial"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; name another file or folder") from error
    if output.exists() and not os.access(output, os.W_OK):
        raise InputError(f"cannot write {path}: its permissions do not allow it; name another file")


def shows_traceback() -> bool:
    """Returns whether the user wants the traceback of every error."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def exit_status(program: str, run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Calls `run(args)` and returns the exit status of the program. A result of None is status 0.

    Bad input and what fails outside of jaxtml (`jaxtml.commands.failures`) become one line on stderr and status 2,
    without a traceback. Any other exception is a fault of jaxtml: it keeps its traceback, and has status 1.

    With `TRACEBACK` in the environment, each of them shows its traceback: an error of the system's may come from a
    mistake of jaxtml.
    """
    try:
        status = run(args) or OK
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if shows_traceback():
            traceback.print_exc()
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has ended, as in `jaxtml info tiny | head -1`
        if shows_traceback():
            traceback.print_exc()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes stdout once more when it ends
        return CLOSED_PIPE
    except Exception as error:
        line = explain(error)
        if line is None or shows_traceback():
            traceback.print_exc()
        if line is not None:
            print(f"{program}: {line}", file=sys.stderr)
            return BAD_INPUT
        print(f"{program}: {_REPORT}", file=sys.stderr)
        return FAULT


class OneLineErrors(argparse.ArgumentParser):
    """A parser that reports wrong arguments in one line. `argparse` would print the whole usage before the line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses unknown arguments here: the parser of all commands would name itself, not the command."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def tool_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """Returns the parser of a tool. `description` is the tool's docstring, `example` a command line that works."""
    return OneLineErrors(
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_tool(parser: argparse.ArgumentParser, tool: Callable[[argparse.Namespace], int | None]) -> NoReturn:
    """Parses the command line, calls `tool` with the arguments, and exits with the status that `tool` returns."""
    sys.exit(exit_status(parser.prog, tool, parser.parse_args()))
