"""Runs the command line: `python -m jaxtml` is the same as `jaxtml`."""

from jaxtml.commands.main import run

run()
