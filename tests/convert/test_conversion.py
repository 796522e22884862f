"""A conversion there and back gives the same bytes, and Orbax can read what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtml import config as configs
from jaxtml.checkpoint.inkling import sink
from jaxtml.checkpoint.inkling.directory import INDEX
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


@pytest.fixture
def shards(release, tmp_path, monkeypatch) -> Path:
    """`release`, cut into several shards with an index."""
    with monkeypatch.context() as patched:
        patched.setattr(sink, "SHARD_BYTES", 200_000)
        write_checkpoint(open_checkpoint(release), tmp_path / "shards", "memory", "hf")
    assert (tmp_path / "shards" / INDEX).is_file() and verify_manifest(tmp_path / "shards")
    return tmp_path / "shards"


def test_a_release_in_shards_has_the_bytes_of_all_its_files_after_the_way_there_and_back(shards, tmp_path):
    # As another program may have written them: with other metadata, tabs, and no last line break.
    first = min(shards.glob("*.safetensors"))
    save_file(load_file(first), first, metadata={"of": "another"})
    index = (shards / INDEX).read_text()
    (shards / INDEX).write_text(index.replace("  ", "\t").rstrip())
    convert(shards, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    for name in [file.name for file in shards.glob("*.safetensors")] + [INDEX]:
        assert (shards / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert verify_manifest(tmp_path / "back") and not (tmp_path / "back" / "safetensors_layout.json").exists()


def test_a_release_in_another_dtype_is_cut_into_files_anew(shards, tmp_path):
    convert(shards, tmp_path / "one", to="hf", dtype="float32", verify=True)
    assert not (tmp_path / "one" / INDEX).exists() and verify_manifest(tmp_path / "one")


def test_a_conversion_of_an_earlier_version_can_be_verified_again(release, tmp_path):
    """In version 0.1.0, the identity of a conversion had a digest of the config. New fields change that digest."""
    convert(release, tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    source, files, _, to, dtype = json.loads(manifest["source"])
    manifest["source"] = json.dumps([source, files, "0123456789abcdef", to, dtype])
    (tmp_path / "ours" / "manifest.json").write_text(json.dumps(manifest))
    assert "tensors equal" in convert(release, tmp_path / "ours", verify=True)


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
