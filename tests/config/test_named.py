"""The named configs: each has a golden text, a docstring and a name, and works without the repository around it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtml import config as configs
from jaxtml.config import Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count_parameters

NAMES = configs.names()
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "configs"


@pytest.mark.parametrize("name", NAMES)
def test_a_named_config_resolves_to_its_golden_text(name, leaves):
    text = "".join(f"{path} = {value!r}\n" for path, value in leaves(configs.load(name)))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"no golden text of {name}: run UPDATE_GOLDEN=1 pytest tests/config"
    assert text == path.read_text(), "the config changed: if it was meant to, run with UPDATE_GOLDEN=1 and commit"


def test_every_golden_text_has_its_config():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_json_carries_a_config_whole(name):
    config = configs.load(name)
    assert configs.from_json(configs.to_json(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_it_is_and_carries_its_name(name):
    assert configs.load(name).name == name
    assert (configs.CONFIG_DIR / f"{name}.py").read_text().startswith('"""`' + name + "`")


def test_there_are_at_most_a_hundred_fields(leaves):
    assert len(list(leaves(configs.load("tiny")))) <= 100


def test_tiny_has_at_most_twelve_million_parameters():
    total, active = count_parameters(InteractionModel(configs.load("tiny")).specs())
    assert active < total <= 12_000_000


def test_a_config_has_these_fields_and_no_other():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields == {"name", "backbone", "duplex", "flow", "vision", "vocoder", "data", "train", "serve"}


def test_an_installed_package_finds_its_configs_without_the_repository(tmp_path):
    """A wheel holds `configs/` as `jaxtml/configs/`; no package `configs` can be imported there."""
    installed = tmp_path / "jaxtml"
    shutil.copytree(ROOT / "jaxtml" / "config", installed / "config")
    shutil.copytree(ROOT / "configs", installed / "configs")
    shutil.copy(ROOT / "jaxtml" / "errors.py", installed)
    (installed / "__init__.py").touch()
    program = "from jaxtml import config; print(config.CONFIG_DIR, [config.load(name).name for name in config.names()])"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == f"{installed.resolve() / 'configs'} {NAMES}"
