"""A conversion there and back gives the same bytes, and Orbax can read what it wrote."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtml import config as configs
from jaxtml.checkpoint.inkling import sink
from jaxtml.checkpoint.opening import open_checkpoint, read_checkpoint
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.checkpoint.source import InMemorySource, first_device_shapes, spec_table
from jaxtml.convert.conversion import convert, write_checkpoint
from jaxtml.convert.inspection import verify_manifest
from jaxtml.errors import InputError
from jaxtml.model.spec import flatten

pytestmark = pytest.mark.usefixtures("many_chunks")


def test_a_conversion_there_and_back_gives_files_with_the_same_bytes(release, tmp_path):
    summary = convert(release, tmp_path / "ours", verify=True)
    assert "tensors equal, logits of 64 tokens too" in summary
    summary = convert(tmp_path / "ours", tmp_path / "hf", to="hf", verify=True)
    assert "tensors equal, logits of 64 tokens too" in summary
    for name in ("model.safetensors", "config.json"):
        assert (release / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    ours = open_checkpoint(tmp_path / "ours")
    dtypes = {path: ours.dtype(path).name for path in spec_table(ours.config)}
    assert dtypes["layers/block0/run0/attn/wq"] == "bfloat16"
    assert {dtype for path, dtype in dtypes.items() if path.endswith("router_bias")} == {"float32"}


def test_orbax_restores_what_a_conversion_wrote(release, tmp_path):
    from orbax.checkpoint import v1 as ocp

    convert(release, tmp_path / "ours")
    config, params = read_checkpoint(tmp_path / "ours")
    restored = ocp.load(str(tmp_path / "ours"), first_device_shapes(config, "float32"))
    for (path, a), (_, b) in zip(flatten(restored), flatten(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), b, err_msg=path)


def test_parameters_in_memory_are_written_with_their_config(releasable, lively, tmp_path):
    params = lively(releasable)
    write_checkpoint(InMemorySource(releasable, params), tmp_path / "a", "memory", "orbax", "float32")
    config, loaded = load_checkpoint(tmp_path / "a")
    assert configs.to_json(config) == configs.to_json(releasable)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_release_in_shards_becomes_one_file_without_an_index(ours, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sink, "SHARD_BYTES", 200_000)
        convert(ours, tmp_path / "shards", to="hf")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file() and verify_manifest(tmp_path / "shards")
    convert(tmp_path / "shards", tmp_path / "one", to="hf", verify=True)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists() and verify_manifest(tmp_path / "one")


def test_a_destination_inside_the_source_is_refused(release):
    with pytest.raises(InputError, match="name a directory outside it"):
        convert(release, release / "out")


def test_a_destination_that_is_a_link_is_written_where_it_points(release, tmp_path):
    (tmp_path / "disk").mkdir()
    for target in ("empty", "new"):
        (tmp_path / target).symlink_to(tmp_path / "disk" / target)
        if target == "empty":
            (tmp_path / "disk" / target).mkdir()
        assert "tensors equal" in convert(release, tmp_path / target, verify=True)
        assert (tmp_path / target).is_symlink() and (tmp_path / "disk" / target / "config.json").is_file()
