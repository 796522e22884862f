"""The command line as a whole: help, exit status, and how fast it starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxtml.commands.main import COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(jaxtml, command):
    status, out, _ = jaxtml(command, "--help")
    assert status == 0
    assert f"example: jaxtml {command}" in out


def test_the_module_runs_as_a_program_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtml", "info", "nosuch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("jaxtml info: no config 'nosuch'")


def test_help_imports_nothing_that_takes_long():
    program = "import sys; from jaxtml.commands.main import parser; parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "flax", "tensorstore", "orbax"} & set(done.stdout.split())
