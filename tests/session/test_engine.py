"""An engine reads a checkpoint directory, and says in one line what is wrong with one that it cannot read."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.errors import InputError
from jaxtml.session.engine import Engine


def test_an_engine_loads_from_a_checkpoint_directory(engine, small, params, codec, tmp_path):
    codec.save(tmp_path / "tokenizer.json")
    save_checkpoint(tmp_path / "ck", small, params, tokenizer_path=tmp_path / "tokenizer.json")
    loaded = Engine.load(tmp_path / "ck")
    assert loaded.config == small
    assert loaded.codec.encode("forty two") == codec.encode("forty two")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, engine.params)


def test_a_directory_without_checkpoint_or_tokenizer_is_refused(small, params, tmp_path):
    with pytest.raises(InputError, match="no checkpoint directory"):
        Engine.load(tmp_path / "missing")
    save_checkpoint(tmp_path / "mute", small, params)
    with pytest.raises(InputError, match="mute has no tokenizer.json, which converse"):
        Engine.load(tmp_path / "mute")
