"""A checkpoint is opened by its directory, and each device reads its own parts and nothing else."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.checkpoint.opening import open_checkpoint, read_checkpoint
from jaxtml.checkpoint.source import Index, index_shape, place_parameters, spec_table
from jaxtml.convert.conversion import convert
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import flatten
from jaxtml.parallel.mesh import MeshShape, make_mesh


@pytest.mark.parametrize("kind", ["release", "ours"])
def test_each_device_reads_its_own_parts_and_nothing_else(kind, release, tmp_path):
    directory = release
    if kind == "ours":
        directory = tmp_path / "ours"
        convert(release, directory)
    source, mesh = open_checkpoint(directory), make_mesh(MeshShape(data=4, expert=2))
    reads: list[tuple[str, Index]] = []

    class WatchedSource:
        config, dtype, holds = source.config, staticmethod(source.dtype), staticmethod(source.holds)

        def read(self, path, index):
            reads.append((path, index))
            return source.read(path, index)

    def shape(spec):
        axes = [{"expert": "expert", "expert_embed": "data"}.get(axis) for axis in spec.axes]
        return jax.ShapeDtypeStruct(spec.shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    placed = place_parameters(WatchedSource(), jax.tree.map(shape, InteractionModel(source.config).specs()))
    _, complete = read_checkpoint(directory)
    for (path, a), (_, b) in zip(flatten(placed), flatten(complete), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)
    specs = spec_table(source.config)
    w13 = next(path for path, spec in specs.items() if {"gate_up", "expert"} <= set(spec.axes))
    shape_of_w13 = specs[w13].shape  # [repeats, layers, expert, gate and up, expert_embed, width]
    shapes = {index_shape(index, shape_of_w13) for path, index in reads if path == w13}
    assert shapes == {(*shape_of_w13[:2], shape_of_w13[2] // 2, 2, shape_of_w13[4] // 4, shape_of_w13[5])}


def test_a_model_in_the_cache_of_a_hub_has_its_own_name_and_not_the_commit(release, tmp_path):
    folder = tmp_path / "models--thinkingmachines--Inkling-Small" / "snapshots" / "0123abcd"
    shutil.copytree(release, folder)
    assert open_checkpoint(folder).config.name == "Inkling-Small"


def test_an_incomplete_download_is_refused(release, tmp_path):
    (tmp_path / "config.json").write_bytes((release / "config.json").read_bytes())
    weight_map = {"model.llm.norm.weight": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="no model-00001-of-00002.safetensors in .*: the checkpoint is incomplete"):
        open_checkpoint(tmp_path)


def test_a_missing_chunk_is_damage_and_not_zeros(release, tmp_path):
    convert(release, tmp_path / "ours")
    (tmp_path / "ours" / "state" / "norm.weight" / "c" / "0").unlink()
    with pytest.raises(InputError, match="damaged or incomplete"):
        read_checkpoint(tmp_path / "ours")
    with pytest.raises(InputError, match="damaged or incomplete"):
        convert(tmp_path / "ours", tmp_path / "hf", to="hf")
