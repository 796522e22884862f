"""Outputs that cannot be written are refused before the long work, and every failure is one line."""

from __future__ import annotations

import argparse

import pytest

from jaxtml.commands.arguments import amount, check_outputs, count, exit_status
from jaxtml.errors import InputError


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    source, out = str(tmp_path / "in.wav"), str(tmp_path / "out.wav")
    check_outputs(out, None, str(tmp_path / "events.jsonl"), source=source)
    for paths, message in (
        ((source,), "in.wav: it is the input; name another file"),
        ((out, out), "out.wav: another output has the same name; name another file"),
        ((str(tmp_path),), "it is a folder; name a file"),
        ((str(tmp_path / "no" / "out.wav"),), "there is no folder .*no"),
    ):
        with pytest.raises(InputError, match=message):
            check_outputs(*paths, source=source)


def test_counts_and_amounts_are_positive():
    assert count("3") == 3 and amount("0.5") == 0.5
    for kind, text in ((count, "0"), (amount, "0"), (amount, "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match="give"):
            kind(text)


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("no such file"), 2), (OSError("disk full"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure_is_one_line_and_an_exit_status(capsys, error, status):
    def fail(args: argparse.Namespace) -> None:
        raise error

    assert exit_status("jaxtml info", fail, argparse.Namespace()) == status
    assert capsys.readouterr().err == (f"jaxtml info: {error}\n" if status == 2 else "")
