"""The command line `jaxtml COMMAND ...`: parses the arguments and calls the module of the command.

Each command is a module beside this one with `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args)`. To add a
command, write such a module and put it into `COMMANDS`. A command imports JAX, and whatever else is slow to import,
inside its `run`: the parser imports every command, and `jaxtml --help` must stay fast.

Bad input ends with one line on stderr and exit status 2. With `--json`, stdout has the JSON output and nothing else.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging as standard_logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from absl import app, logging
from absl.flags import argparse_flags

from jaxtml.commands import converse, convert, data, info, logits, plan, serve, train
from jaxtml.commands.arguments import exit_status

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtml" / "compiled"
"""The default folder of compiled programs. A program that was compiled once starts in a fraction of the time."""


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


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands. The parsed arguments have the name of the command as `command`."""
    top = argparse_flags.ArgumentParser(prog="jaxtml", description="Full-duplex interaction models in JAX.")
    parsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            parsers.add_parser(
                name, help=command.HELP, description=command.HELP, epilog=f"example: jaxtml {command.EXAMPLE}"
            )
        )
    return top


def main(args: argparse.Namespace) -> int:
    """Sets up the compilation cache and the log, runs the command, and returns the exit status."""
    _set_up_compilation_cache()
    _set_up_log()
    return exit_status(f"jaxtml {args.command}", COMMANDS[args.command].run, args)


def _set_up_compilation_cache() -> None:
    """Makes JAX keep compiled programs in `CACHE`, or in the folder that the environment names."""
    # Environment variables, because the processes that a command starts inherit them.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    minimum_s = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", minimum_s)


def _set_up_log() -> None:
    """Shows our messages from INFO on, and those of other packages from WARNING on."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Orbax and JAX write many messages at INFO, through the same logger.
    package = str(Path(__file__).resolve().parents[1])
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > standard_logging.INFO or record.pathname.startswith(package)
    )


def run(argv: Sequence[str] | None = None) -> None:
    """The entry point of the console script. Exits the process. `argv` begins with the program's name."""
    # At exit, Python's garbage collector searches all of JAX, which takes a third of a second. It skips frozen objects.
    atexit.register(gc.freeze)
    app.run(main, argv=list(argv or sys.argv), flags_parser=lambda a: parser().parse_args(a[1:]))


if __name__ == "__main__":
    run()
