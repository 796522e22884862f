"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path, codec) -> Path:
    """A data folder that has a tokenizer and nothing else."""
    folder = tmp_path / "data"
    folder.mkdir()
    codec.save(folder / "tokenizer.json")
    return folder
