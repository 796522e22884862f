"""The examples run as they stand, on the shipped model, and the notebook is committed without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import soundfile

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "first_session.ipynb"


def run_python(source: Path, folder: Path) -> str:
    """Runs a script in `folder`, and returns what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES.parent),
        "MPLBACKEND": "Agg",
        # The examples share their compiled programs through the cache of the test run.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, str(source)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ten_lines_of_python_hear_a_person_and_answer(tmp_path: Path):
    source = (EXAMPLES / "ten_lines.py").read_text()
    code = source.split('"""', 2)[2].split("\n")
    assert len([line for line in code if line.strip()]) == 10
    assert source.split('"""', 2)[2].strip() in (EXAMPLES.parent / "README.md").read_text(), "the README shows it"
    printed = run_python(EXAMPLES / "ten_lines.py", tmp_path)
    assert "heard:  three" in printed and "speak" in printed
    reply, rate = soundfile.read(tmp_path / "reply.wav")
    assert rate == 16_000 and abs(reply).max() > 0.01


def test_a_conversation_is_shown_as_its_tokens(tmp_path: Path):
    lines = run_python(EXAMPLES / "encode_conversation.py", tmp_path).splitlines()
    assert lines[0].split() == ["0.0", "s", "TURN", "TYPED", "'", "hello'", *["user"] * 4, "(LISTEN)"]
    assert lines[4].split()[-6:] == ["seven'", "(SPEAK)", "own", "own", "own", "own"]
    assert lines[-2:] == ["heard: ['seven']", "said: ['seven']"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    script = tmp_path / "cells.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    printed = run_python(script, tmp_path)
    assert "heard:  three" in printed and "said 'it is seven" in printed
    assert (tmp_path / "reply.wav").stat().st_size > 100_000


def test_the_notebook_is_valid_and_has_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        code = cell["cell_type"] == "code"
        keys = {"cell_type", "id", "metadata", "source"} | ({"outputs", "execution_count"} if code else set())
        assert set(cell) == keys and cell["metadata"] == {}
        if code:
            assert cell["outputs"] == [] and cell["execution_count"] is None
