"""A small released checkpoint in float32, as the maker of the golden files describes it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.config import Config
from jaxtml.errors import InputError

ROOT = Path(__file__).parents[3]
GOLDENS = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_backbone_golden.py"), run_name="golden")


@pytest.fixture
def described() -> dict[str, Any]:
    """The `config.json` of `checkpoint`."""
    return GOLDENS["CASES"]["text"]


@pytest.fixture
def config(described) -> Config:
    """The config of `checkpoint`."""
    return config_from_inkling(described)


@pytest.fixture
def checkpoint(described, config, tmp_path) -> Path:
    """The directory of a released checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(GOLDENS["released_weights"](config), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def refusal() -> Callable[[Path], str]:
    """`refusal(directory)` reads a checkpoint that must be refused, and returns the message of one line."""

    def read_refused(directory: Path) -> str:
        with pytest.raises(InputError) as caught:
            read_checkpoint(directory)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read_refused
