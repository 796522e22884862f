"""The command line as a whole: help, exit status, and how fast it starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtml import __version__
from jaxtml.commands import main
from jaxtml.commands.main import COMMANDS
from jaxtml.data.packages import cached_file
from jaxtml.errors import InputError
from jaxtml.user_cache import cache_folder, is_writable_folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(jaxtml, command):
    status, out, _ = jaxtml(command, "--help")
    assert status == 0
    assert f"example: jaxtml {command}" in out


def test_the_help_names_the_variable_that_shows_tracebacks(jaxtml):
    assert "JAXTML_TRACEBACK=1" in jaxtml("--help")[1]


def test_the_module_runs_as_a_program_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtml", "info", "nosuch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("jaxtml info: no config 'nosuch'")


def test_the_version_is_printed(jaxtml):
    assert jaxtml("--version") == (0, f"jaxtml {__version__}\n", "")


@pytest.mark.parametrize("argv", [(), ("info",), ("train", "tiny", "--workdir", "w", "--steps", "x"), ("nosuch",)])
def test_wrong_arguments_are_one_line_that_names_the_help(jaxtml, argv):
    status, out, err = jaxtml(*argv)
    assert status == 2 and not out
    assert err.count("\n") == 1 and err.startswith("jaxtml") and "--help`" in err


@pytest.mark.parametrize("command", [("info", "tiny"), ("plan", "tiny", "--topology", "v5p-8"), ("convert", "a", "b")])
def test_an_argument_too_many_is_named_with_its_command(jaxtml, command):
    status, _, err = jaxtml(*command, "extra", "--nosuch")
    assert status == 2
    assert err == f"jaxtml {command[0]}: unrecognized arguments: extra --nosuch; see `jaxtml {command[0]} --help`\n"


def test_a_command_runs_though_its_output_is_closed():
    program = [sys.executable, "-m", "jaxtml", "info", "nosuch"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *program], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_errors_of_tensorstore_after_orbax_closed_its_event_loop_are_not_reported(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "__unraisablehook__", reported.append)
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    main._report_unraisable(late)
    main._report_unraisable(other)
    assert reported == [other]


def test_a_user_without_a_home_gets_no_cache_and_no_failure(monkeypatch, tmp_path):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    with pytest.raises(InputError, match="set HOME or XDG_CACHE_HOME"):
        cached_file("voice.onnx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxtml"


def test_a_cache_folder_is_used_only_if_it_can_be_written(tmp_path):
    assert is_writable_folder(tmp_path / "not" / "there")
    (tmp_path / "file").touch()
    assert not is_writable_folder(tmp_path / "file" / "compiled")
    assert not is_writable_folder(Path("/proc/jaxtml"))


def test_help_imports_nothing_that_takes_long():
    program = "import sys; from jaxtml.commands.main import parser; parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "flax", "tensorstore", "orbax"} & set(done.stdout.split())
