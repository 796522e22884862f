"""What the tests of the server share."""

from __future__ import annotations

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
