"""The test command itself: optional parts never fail it, and it says what did not run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.order import LONGEST_FIRST, TESTS

ROOT = Path(__file__).parents[2]

SUITE = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_voice(n):
    pytest.skip("needs a voice: tools/install_voices")

def test_browser():
    pytest.skip("needs a browser: apt-get install chromium")

@pytest.mark.slow
def test_long(): ...

def test_other(): ...
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with tools/setup.sh."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", tmp_path / "tools")
    return tmp_path


def bash(checkout: Path, script: str) -> str:
    """Runs a script that has sourced tools/setup.sh and returns its output."""
    command = ["bash", "-euo", "pipefail", "-c", f". tools/setup.sh; {script}"]
    return subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout


def test_a_step_that_succeeded_is_not_repeated(checkout):
    step = 'try_step part 10 "echo once >>log"'
    assert "installing part" in bash(checkout, step)
    assert bash(checkout, step) == ""
    assert (checkout / "log").read_text() == "once\n"


def test_a_step_that_fails_is_named_with_its_reason_and_stops_nothing(checkout):
    printed = bash(checkout, 'try_step part 10 "echo no such package; false"; echo afterwards')
    assert "part: not installed; its tests are skipped (no such package)" in printed
    assert printed.endswith("afterwards\n")
    again = bash(checkout, 'try_step part 10 "touch was_run"')
    assert "rm .venv/steps/part.failed" in again and not (checkout / "was_run").exists()


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the command timeout: install GNU coreutils")
def test_a_step_that_takes_too_long_is_ended(checkout):
    assert "part: not installed within 1 s" in bash(checkout, 'try_step part 1 "sleep 60"')


@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_a_run_ends_with_what_did_not_run_and_why(processes, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    hooks = "pytest_deselected, pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown"
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.not_run import {hooks}"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *processes]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    listed = printed.partition("tests that did not run")[2]
    assert re.search(r"^ +3  needs a voice: tools/install_voices$", listed, re.MULTILINE)
    assert re.search(r"^ +1  needs a browser: apt-get install chromium$", listed, re.MULTILINE)
    assert re.search(r"^ +1  not selected by -m 'not slow'$", listed, re.MULTILINE)
    assert "in test_suite.py" in listed


def test_the_files_that_run_first_exist():
    missing = [file for file in LONGEST_FIRST if not (TESTS / file).is_file()]
    assert not missing, "moved or removed: correct LONGEST_FIRST in tests/order.py"
