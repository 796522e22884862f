"""The command line `jaxtml COMMAND ...`: parses the arguments and calls the module of the command.

Each command is a module beside this one with `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args)`. To add a
command, write such a module and put it into `COMMANDS`. A command imports JAX, and whatever else is slow to import,
inside its `run`: the parser imports every command, and `jaxtml --help` must stay fast.

Bad input ends with one line on stderr and exit status 2; `JAXTML_TRACEBACK=1` shows the traceback too. With `--json`,
stdout has the JSON output and nothing else.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging as standard_logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from absl import app, logging
from absl.flags import argparse_flags

from jaxtml import __version__
from jaxtml.commands import converse, convert, data, info, logits, plan, serve, train
from jaxtml.commands.arguments import TRACEBACK, OneLineErrors, exit_status, shows_traceback
from jaxtml.commands.failures import explain
from jaxtml.errors import InputError
from jaxtml.user_cache import cache_folder, is_writable_folder

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


class Command(Protocol):
    """What `main` needs of the module of a command."""

    @property
    def HELP(self) -> str:
        """Says in the imperative what the command does."""
        ...

    @property
    def EXAMPLE(self) -> str:
        """A command line that works, without "jaxtml"."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments of the command."""
        ...

    def run(self, args: argparse.Namespace) -> None:
        """Runs the command. Raises `InputError` if the user's input cannot be used."""
        ...


COMMANDS: dict[str, Command] = {
    "info": info,
    "converse": converse,
    "serve": serve,
    "logits": logits,
    "train": train,
    "data": data,
    "plan": plan,
    "convert": convert,
}


class _Parser(OneLineErrors, argparse_flags.ArgumentParser):
    """The parser of the command line and of each command."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands. The parsed arguments have the name of the command as `command`."""
    top = _Parser(
        prog="jaxtml",
        description="Full-duplex interaction models in JAX.",
        epilog=f"environment: with {TRACEBACK}=1, an error shows its traceback above its line",
    )
    top.add_argument("--version", action="version", version=f"jaxtml {__version__}")
    parsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            parsers.add_parser(
                name, help=command.HELP, description=command.HELP, epilog=f"example: jaxtml {command.EXAMPLE}"
            )
        )
    return top


def main(args: argparse.Namespace) -> int:
    """Sets up the log and the compilation cache, runs the command, and returns the exit status."""
    _set_up_log()
    return exit_status(f"jaxtml {args.command}", _run_command, args)


def _run_command(args: argparse.Namespace) -> None:
    _set_up_compilation_cache()
    COMMANDS[args.command].run(args)


def _set_up_compilation_cache() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, or in the folder that the environment names.

    A program that was compiled once starts in a fraction of the time. Where no such folder can be written, programs are
    compiled anew by every command.
    """
    # Environment variables, because the processes that a command starts inherit them.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    default = cache_folder()
    folder = os.environ.get(_CACHE_VARIABLE) or (str(default / "compiled") if default else "")
    # JAX also takes addresses such as gs://bucket/folder.
    if folder and ("://" in folder or is_writable_folder(Path(folder))):
        os.environ[_CACHE_VARIABLE] = folder
    else:
        os.environ.pop(_CACHE_VARIABLE, None)
        reason = f"{folder} cannot be written" if folder else "the user has no home folder"
        logging.warning("compiled programs are not kept: %s; set %s to a folder", reason, _CACHE_VARIABLE)
    try:
        import jax

        jax.config.update("jax_compilation_cache_dir", os.environ.get(_CACHE_VARIABLE))
        minimum_s = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", minimum_s)
    except ValueError as error:
        raise InputError(
            f"JAX cannot read one of its environment variables: unset it, or correct it: {error}"
        ) from error


def _set_up_log() -> None:
    """Shows our messages from INFO on, and those of other packages from WARNING on.

    Orbax logs an error with its traceback and then raises the error, which we report in one line: only what it calls
    fatal is shown.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    package = str(Path(__file__).resolve().parents[1])

    def is_shown(record: standard_logging.LogRecord) -> bool:
        if record.pathname.startswith(package):
            return True
        least = standard_logging.CRITICAL if f"{os.sep}orbax{os.sep}" in record.pathname else standard_logging.WARNING
        return record.levelno >= least

    logging.get_absl_handler().addFilter(is_shown)


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Reports the exception that ended a thread of a library in one line, for example TensorBoard's on a full disk."""
    line = explain(failure.exc_value) if failure.exc_value else None
    if line is None or shows_traceback():
        threading.__excepthook__(failure)
    if line is not None:
        print(f"jaxtml: a background thread has ended: {line}", file=sys.stderr)


def _report_callback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Reports an exception that no caller catches, such as one in a callback of a library.

    Exceptions of a command do not come here: `exit_status` catches and reports them.
    """
    if not _is_late(error):
        sys.__excepthook__(kind, error, trace)


def _report_unraisable(failure: Any) -> None:
    """Reports an exception in a function that a library calls from its own thread."""
    if not _is_late(failure.exc_value):
        sys.__unraisablehook__(failure)


def _is_late(error: BaseException | None) -> bool:
    """Returns whether a read or write of TensorStore could not report its end, because nobody waits for it any more.

    If Orbax gives up a checkpoint, it closes its event loop. Each of TensorStore's reads and writes then fails to
    report there, hundreds of times, and none of these errors says anything about the disk.
    """
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _leave(status: int) -> NoReturn:
    """Ends the process now, after the functions of `atexit`. Does not wait for threads.

    After a checkpoint that could not be written, threads of Orbax wait ten minutes for a signal that never comes.
    """
    # The failure has been reported by now. TensorBoard's thread, and its function of `atexit`, would fail on the same
    # disk again: do not report that too.
    sys.unraisablehook = threading.excepthook = lambda failure: None
    atexit._run_exitfuncs()  # ends worker processes and leaves the job of several processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(argv: Sequence[str] | None = None) -> None:
    """The entry point of the console script. Exits the process. `argv` begins with the program's name."""
    # At exit, Python's garbage collector searches all of JAX, which takes a third of a second. It skips frozen objects.
    atexit.register(gc.freeze)
    is_program = argv is None  # else a test calls this function, and its process goes on
    if is_program:
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # None if the caller has closed it
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        threading.excepthook = _report_thread
        sys.excepthook = _report_callback
        sys.unraisablehook = _report_unraisable
        # When a run stops early, Grain's workers leave shared memory behind. Python's resource tracker frees it, and
        # would warn that it does.
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        app.run(main, argv=list(argv or sys.argv), flags_parser=lambda a: parser().parse_args(a[1:]))
    except SystemExit as ended:
        if is_program and isinstance(ended.code, int) and ended.code:
            _leave(ended.code)
        raise


if __name__ == "__main__":
    run()
