"""What the tests of the server share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxtml.checkpoint.orbax.saving import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(small, params, codec, tmp_path_factory) -> Path:
    """The small model on disk."""
    folder = tmp_path_factory.mktemp("served")
    codec.save(folder / "tokenizer.json")
    save_checkpoint(folder / "ck", small, params, tokenizer_path=folder / "tokenizer.json")
    return folder / "ck"


@pytest.fixture(scope="session")
def short_checkpoint(small, lively, codec, tmp_path_factory) -> Path:
    """The small model with two of its five layers, on disk. It is for tests of processes: they start twice as fast."""
    folder = tmp_path_factory.mktemp("short")
    codec.save(folder / "tokenizer.json")
    config = dataclasses.replace(small, backbone=dataclasses.replace(small.backbone, n_layers=2, global_layers=(1,)))
    save_checkpoint(folder / "ck", config, lively(config), tokenizer_path=folder / "tokenizer.json")
    return folder / "ck"
