"""Outputs that cannot be written are refused before the long work, and every failure is one line."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

import jax
import pytest

from jaxtml.commands.arguments import (
    MOST_WORKERS,
    TRACEBACK,
    amount,
    check_outputs,
    count,
    exit_status,
    folder_name,
    path_name,
    worker_count,
)
from jaxtml.commands.failures import explain
from jaxtml.errors import InputError


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    source, out = str(tmp_path / "in.wav"), str(tmp_path / "out.wav")
    Path(source).touch()
    os.link(source, tmp_path / "link.wav")
    check_outputs(out, None, str(tmp_path / "events.jsonl"), "/dev/null", "/dev/null", sources=[source, None])
    for paths, message in (
        ((source,), "in.wav: it is an input; name another file"),
        ((str(tmp_path / "link.wav"),), "link.wav: it is an input; name another file"),
        ((out, out), "out.wav: another output has the same name; name another file"),
        ((str(tmp_path),), "it is a folder; name a file"),
        ((str(tmp_path / "no" / "out.wav"),), "there is no folder .*no"),
        ((str(tmp_path / ("n" * 250)),), "File name too long; name another file"),
        (("/proc/out.wav",), "cannot write /proc/out.wav: .*; name another"),
        ((f"{source}/out.wav",), "cannot write .*: .*in.wav is a file; name another folder"),
        (("-",), "cannot write -: .*; name a file"),
    ):
        with pytest.raises(InputError, match=message):
            check_outputs(*paths, sources=["other.wav", source])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.wav", "link.wav"]


def test_counts_and_amounts_are_positive():
    assert count("3") == 3 and amount("0.5") == 0.5
    for kind, text in ((count, "0"), (amount, "0"), (amount, "inf"), (path_name, " ")):
        with pytest.raises(argparse.ArgumentTypeError, match="give"):
            kind(text)
    for address in ("gs://bucket/run", "https://example.org/x.npy"):
        with pytest.raises(argparse.ArgumentTypeError, match="is an address, .* copy or mount it here"):
            path_name(address)
    assert path_name("C:/x") == "C:/x"
    assert folder_name("naïve") == "naïve"
    with pytest.raises(argparse.ArgumentTypeError, match=r"'a\\udcff' is not UTF-8: rename the folder"):
        folder_name(os.fsdecode(b"a\xff"))
    for kind, text in ((count, "1.5"), (count, ""), (amount, "x")):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a .*number"):
            kind(text)


def jax_error(text: str) -> Exception:
    return jax.errors.JaxRuntimeError(text)


def wrapped(error: Exception) -> Exception:
    """Returns an error of a library. `error`, an error of the disk, is its cause."""
    outer = ValueError("cannot write the array")
    outer.__cause__ = error
    return outer


def test_automatic_workers_follow_the_cores_that_this_process_may_use(monkeypatch):
    for cores, both, halves in ((1, 1, 1), (2, 2, 1), (16, 16, 8), (208, MOST_WORKERS, MOST_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert (worker_count(1)("auto"), worker_count(2)("auto"), worker_count(2)("7")) == (both, halves, 7)
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        worker_count(1)("0")


def test_a_device_that_jax_lacks_is_named_and_another_assertion_is_a_fault(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    lines = []
    for file in ("/x/jax/_src/xla_bridge.py", "/x/model.py"):
        program = compile("def backends(): assert False\nbackends()", file, "exec")
        with pytest.raises(AssertionError) as failed:
            exec(program)
        lines.append(explain(failed.value))
    assert lines == ["JAX has no such device here (JAX_PLATFORMS=cuda): unset JAX_PLATFORMS or set it to cpu", None]


def test_the_exception_context_explains_an_error_of_a_library_but_not_a_fault_of_jaxtml(monkeypatch):
    for file, line in (("/x/library.py", "run: there is no such file or folder: check the path"), (__file__, None)):
        monkeypatch.setattr("jaxtml.commands.failures._PACKAGE", os.path.dirname(__file__))
        program = "try:\n    raise FileNotFoundError(2, 'x', 'run')\nexcept OSError:\n    raise ValueError('y')"
        with pytest.raises(ValueError, match="y") as failed:
            exec(compile(program, file, "exec"))
        assert explain(failed.value) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("no such file"), "no such file"),
        (OSError("disk full"), "disk full"),
        (OSError(errno.ENOSPC, "x", "run/log.jsonl"), "run/log.jsonl: the disk is full: free some space"),
        (OSError(errno.EDQUOT, "x", "run"), "run: the disk quota is used up: free"),
        (PermissionError(errno.EACCES, "x", "run"), "run: permission denied: change its permissions"),
        (IsADirectoryError(errno.EISDIR, "x", "out.wav"), "out.wav: it is a folder, and a file is needed: name"),
        (NotADirectoryError(errno.ENOTDIR, "x", "a/b"), "a/b: a part of this path is a file"),
        (FileNotFoundError(errno.ENOENT, "x", "a"), "a: there is no such file or folder: check the path"),
        (wrapped(OSError(errno.ENOSPC, "x", "run/0")), "run/0: the disk is full: free some space"),
        (ValueError("Error writing /run/d/1 [No space left on device]"), "/run/d/1: the disk is full: free"),
        (jax_error("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"), "not enough memory for 99 bytes: end"),
        (MemoryError(), "there is not enough memory: end other programs"),
        (jax_error("UNAVAILABLE: failed to connect\nto all"), "lost the connection to the other processes of the job"),
        (RuntimeError("Unable to initialize backend 'gpu': none"), "JAX has no such device here: unset JAX_PLATFORMS"),
        (ModuleNotFoundError("x", name="aiortc.media"), "the Python package aiortc is missing: install"),
    ],
)
def test_what_fails_outside_of_jaxtml_is_one_line_with_the_remedy(capsys, error, line):
    def fail(args: argparse.Namespace) -> None:
        raise error

    assert exit_status("jaxtml info", fail, argparse.Namespace()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("jaxtml info: ") and line in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("loss"), ModuleNotFoundError("x", name="jaxtml.gone"), jax_error("INTERNAL")]
)
def test_a_fault_of_jaxtml_keeps_its_traceback_and_says_how_to_report_it(capsys, error):
    def fail(args: argparse.Namespace) -> None:
        try:
            raise OSError(errno.ENOSPC, "x", "handled already")
        except OSError:
            if isinstance(error, KeyError):
                raise error  # noqa: B904  # as a mistake in a handler does
            raise error from None

    assert exit_status("jaxtml info", fail, argparse.Namespace()) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.splitlines()[-1].startswith("jaxtml info: this is a fault of jaxtml")
    assert "report it" in printed and "--version" in printed


@pytest.mark.parametrize("value, shown", [("1", True), ("0", False), ("", False)])
@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x", ""), InputError("no"), KeyboardInterrupt()])
def test_every_error_shows_its_traceback_if_the_user_wants_it(capsys, monkeypatch, error, value, shown):
    def fail(args: argparse.Namespace) -> None:
        raise error

    expected = exit_status("jaxtml info", fail, argparse.Namespace())
    line = capsys.readouterr().err
    monkeypatch.setenv(TRACEBACK, value)
    assert exit_status("jaxtml info", fail, argparse.Namespace()) == expected
    printed = capsys.readouterr().err
    assert printed.endswith(line) and (printed != line) == shown
    assert ("Traceback" in printed and "in fail" in printed) == shown


def test_an_interrupted_command_prints_nothing(capsys):
    def fail(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    assert exit_status("jaxtml info", fail, argparse.Namespace()) == 130
    assert capsys.readouterr().err == ""
