"""A release that we write has the tensors of the release that was read, in one file or in shards."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file

from jaxtml.checkpoint.inkling import sink
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.source import InMemorySource
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.model.spec import flatten


def test_saving_what_was_loaded_gives_the_same_tensors(checkpoint, tmp_path):
    config, params = read_checkpoint(checkpoint)
    write_checkpoint(InMemorySource(config, params), tmp_path / "again", "memory", "hf", "float32")
    first, again = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again"))
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


def test_a_bfloat16_checkpoint_in_shards_can_be_read(checkpoint, tmp_path, monkeypatch):
    config, params = read_checkpoint(checkpoint)
    monkeypatch.setattr(sink, "SHARD_BYTES", 200_000)
    write_checkpoint(InMemorySource(config, params), tmp_path / "shards", "memory", "hf", "bfloat16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    read_config, rounded = read_checkpoint(tmp_path / "shards")
    assert read_config.backbone == config.backbone
    for (path, a), (_, b) in zip(flatten(params), flatten(rounded), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8, err_msg=path)


def test_the_router_bias_stays_float32_in_a_bfloat16_checkpoint(checkpoint, tmp_path):
    config, params = read_checkpoint(checkpoint)
    write_checkpoint(InMemorySource(config, params), tmp_path / "bf16", "memory", "hf", "bfloat16")
    _, again = read_checkpoint(tmp_path / "bf16")
    for name in ("router_bias", "global_scale"):
        a, b = (tree["layers"]["block0"]["run1"]["mlp"][name] for tree in (params, again))
        np.testing.assert_array_equal(a, b)
