"""The shell scripts of a first-time user: `tools/demo`, `tools/test` and `tools/install_voices`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from jaxtml.checkpoint.files import SHIPPED

ROOT = Path(__file__).parents[2]
SCRIPTS = ("tools/demo", "tools/test", "tools/install_voices")
ENVIRONMENT = Path(sys.prefix)


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with no terminal."""
    command, none = ["bash", script, *arguments], subprocess.DEVNULL
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, stdin=none, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path) -> Path:
    """What the scripts need of a clone, without an environment."""
    folder = tmp_path / "clone"
    (folder / "tools").mkdir(parents=True)
    for name in ("setup.sh", *(Path(script).name for script in SCRIPTS)):
        shutil.copy(ROOT / "tools" / name, folder / "tools")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "jaxtml").symlink_to(ROOT / "jaxtml")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_does_and_does_nothing(script, clone):
    done = run(script, "--help", cwd=clone)
    assert done.returncode == 0 and f"Usage: {script}" in done.stdout, done
    assert not (clone / ".venv").exists()


def test_the_demo_refuses_a_missing_recording_before_it_installs_anything(clone):
    done = run("tools/demo", "mine.wav", cwd=clone)
    assert done.returncode == 2
    assert re.fullmatch(r"tools/demo: there is no file \S+/mine.wav: name a recording .*\n", done.stderr)
    assert not (clone / ".venv").exists()


def test_voices_are_not_installed_outside_of_an_environment_with_jaxtml(clone):
    done = run("tools/install_voices", cwd=clone, PATH="/usr/bin:/bin", PYTHONPATH="")
    assert done.returncode == 2
    assert done.stderr == "tools/install_voices: jaxtml is not installed: run tools/demo first, which makes .venv\n"


@pytest.mark.slow
@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "jaxtml").exists(), reason="needs an environment of tools/test")
def test_the_demo_runs_and_says_how_to_go_on(clone):
    """In the environment of the tests, with a short recording. A first run would install everything again."""
    (clone / ".venv").mkdir()
    (clone / ".venv" / "bin").symlink_to(ENVIRONMENT / "bin")
    inputs = subprocess.run(
        f"{sys.executable} -V; cat setup.py pyproject.toml", shell=True, cwd=clone, capture_output=True, check=True
    )
    (clone / ".venv" / ".stamp").write_bytes(inputs.stdout)
    wave, rate = soundfile.read(SHIPPED.parent / "demo" / "human.flac", frames=16_000)
    soundfile.write(clone / "mine.wav", wave, rate)
    done = run("tools/demo", "mine.wav", cwd=clone, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for name in ("reply.wav", "stereo.wav", "timeline.png", "events.jsonl"):
        assert (clone / "out" / "demo" / name).is_file()
    assert f". {clone}/.venv/bin/activate\n" in done.stdout
