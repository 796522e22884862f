"""A release is refused if its index and its files disagree about a file or a tensor. A wrong total size only warns."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtml.checkpoint.inkling.shards import stored_tensors
from jaxtml.errors import InputError

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
TENSORS = [{"a": np.zeros(2, np.float32), "b": np.ones(1, np.float32)}, {"c": np.zeros(3, np.float32)}]


@pytest.fixture
def shards(tmp_path) -> Path:
    """A directory with two shards and their index."""
    for name, tensors in zip(SHARDS, TENSORS, strict=True):
        save_file(tensors, tmp_path / name)
    weight_map = {tensor: name for name, tensors in zip(SHARDS, TENSORS, strict=True) for tensor in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return tmp_path


def change_index(shards: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((shards / INDEX).read_text())
    change(index)
    (shards / INDEX).write_text(json.dumps(index))


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        stored_tensors(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_tensors_are_found_without_a_word(shards, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        assert set(stored_tensors(shards)) == {"a", "b", "c"}
    assert not caplog.text


@pytest.mark.parametrize(
    "file", ["../m.safetensors", "/m.safetensors", "", "..", "a\0.safetensors", "x/m.safetensors", "m.bin", 3, None,
             "m" * 300 + ".safetensors"]
)  # fmt: skip
def test_an_index_may_name_only_safetensors_files_beside_it(file, shards):
    change_index(shards, lambda index: index["weight_map"].update(c=file))
    assert f"{INDEX} places c in " in (message := refusal(shards))
    assert "no safetensors file beside it: download the index again" in message


@pytest.mark.parametrize("weight_map", [{}, None, ["a"]])
def test_an_index_without_a_map_is_refused(weight_map, shards):
    change_index(shards, lambda index: index.update(weight_map=weight_map))
    assert "has no weight_map from tensors to files: download it again" in refusal(shards)


def test_a_tensor_that_the_index_places_in_a_shard_that_lacks_it_is_named(shards):
    change_index(shards, lambda index: index["weight_map"].update(ghost=SHARDS[0]))
    assert "1 tensors of the index are in no shard, download it again: ghost" in refusal(shards)


def test_a_tensor_that_the_index_does_not_name_is_refused(shards):
    change_index(shards, lambda index: index["weight_map"].pop("b"))
    assert f"1 tensors of {SHARDS[0]} are not in its index, download the index again: b" in refusal(shards)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00003-of-00003.safetensors", "other.safetensors"])
def test_a_file_that_the_index_does_not_name_is_refused(name, shards):
    save_file({"d": np.zeros(1, np.float32)}, shards / name)
    assert f"has {name}, which {INDEX} does not name: move such files away" in refusal(shards)


def test_a_tensor_in_two_shards_is_named_with_both(shards):
    save_file(load_file(shards / SHARDS[1]) | {"a": np.zeros(2, np.float32)}, shards / SHARDS[1])
    assert f"has a in {SHARDS[1]} and in {SHARDS[0]}: remove one" in refusal(shards)


def test_prediction_heads_in_a_file_of_their_own_need_no_place_in_the_index(shards):
    save_file({"model.mtp.x": np.zeros(1, np.float32)}, shards / "mtp.safetensors")
    assert "model.mtp.x" in stored_tensors(shards)


@pytest.mark.parametrize("total", [23, 24.5, "24"])
def test_another_total_size_in_the_index_is_said(total, shards, caplog):
    change_index(shards, lambda index: index["metadata"].update(total_size=total))
    assert len(stored_tensors(shards)) == 3
    assert f"its index says that the tensors have {total!r} bytes, and they have 24" in caplog.text


@pytest.mark.parametrize("missing", [SHARDS[:1], SHARDS])
def test_missing_shards_are_counted_and_named(missing, shards):
    for name in missing:
        (shards / name).unlink()
    assert f"no {', '.join(missing)} in {shards}, {len(missing)} of the 2 files that {INDEX} names" in refusal(shards)
    (shards / f"{SHARDS[0]}.incomplete").touch()
    assert f"its download has not ended ({SHARDS[0]}.incomplete), run it again" in refusal(shards)
