"""Runs commands as a user calls them, with a small checkpoint and a recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.commands.main import main, parser
from jaxtml.stream.timebase import SAMPLE_RATE

Jaxtml = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def checkpoint(small, params, codec, tmp_path_factory) -> Path:
    """The directory of a jaxtml checkpoint of the small model."""
    folder = tmp_path_factory.mktemp("commands")
    codec.save(folder / "tokenizer.json")
    save_checkpoint(folder / "small", small, params, None, folder / "tokenizer.json")
    return folder / "small"


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Path:
    """A WAV file of 1.3 s of noise."""
    path = tmp_path_factory.mktemp("commands") / "user.wav"
    wave = 0.1 * np.random.default_rng(0).standard_normal(round(1.3 * SAMPLE_RATE))
    soundfile.write(path, wave, SAMPLE_RATE)
    return path


@pytest.fixture
def jaxtml(capsys) -> Jaxtml:
    """`jaxtml(*argv)` runs a command and returns its exit status, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            status = main(parser().parse_args([str(a) for a in argv]))
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refusal(jaxtml) -> Callable[..., str]:
    """`refusal(*argv)` runs a command that must fail, and returns the one line that it prints."""

    def run_refused(*argv: object) -> str:
        status, out, err = jaxtml(*argv)
        assert status == 2
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("jaxtml ")]
        assert len(lines) == 1, err
        assert not out
        return lines[0]

    return run_refused
