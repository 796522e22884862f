"""An installed wheel: one top-level package, with everything that the commands read, and no need of the checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import jaxtml

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "jaxtml", "configs", "launch")


def setuptools_major() -> int:
    try:
        return int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        return 0


NEEDED = "needs setuptools 77 or newer: pip install -e '.[test]'"
pytestmark = pytest.mark.skipif(setuptools_major() < 77, reason=NEEDED)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built in a copy so that the checkout gets no build folder."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that has the wheel's contents, as `pip install` lays them."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def python(installed: Path, *arguments: str) -> str:
    """Runs Python outside the checkout, with the installed folder before all others; returns its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=installed.parent, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_wheel_has_one_top_level_package_and_every_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"jaxtml"}
    places = {"jaxtml": "jaxtml", "configs": "jaxtml/configs", "launch": "jaxtml/launch"}
    for folder, place in places.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"{place}/{file.relative_to(ROOT / folder)}" in names, f"the wheel lacks {file}"


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
        licences = {entry.rpartition("/")[2] for entry in archive.namelist() if ".dist-info/" in entry}
    assert metadata["Version"] == jaxtml.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()
    assert licences >= {"LICENSE", "NOTICE"}


def test_an_installed_wheel_works_outside_the_checkout(installed):
    found = python(installed, "-c", "import jaxtml; print(jaxtml.__file__, jaxtml.__version__)").split()
    assert Path(found[0]).is_relative_to(installed) and found[1] == jaxtml.__version__
    described = python(installed, "-m", "jaxtml", "info", "tml_interaction_small")
    assert '"name": "tml_interaction_small"' in described and "active per token" in described
