"""Where every parameter of the 276B model lies on five pods, and a clear error for a mesh that does not fit."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtml import config as configs
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import flatten
from jaxtml.parallel.mesh import SERVE, TRAIN, MeshShape, axis_names, make_mesh, partition_spec

GOLDEN = Path(__file__).parents[1] / "golden" / "sharding"
# v5p-512 and v6e-256 have 256 chips of one device each; tpu7x-512 has 256 chips of two devices each.
PODS = {
    "v5p-512": (MeshShape(data=32, expert=8), TRAIN),
    "v6e-256": (MeshShape(data=32, expert=8), TRAIN),
    "tpu7x-512": (MeshShape(data=64, expert=8), TRAIN),
    "h100-64": (MeshShape(replica=1, data=8, expert=8), TRAIN),
    "serve-v5p-16": (MeshShape(expert=2, tensor=4), SERVE),
}


@pytest.fixture(scope="module")
def table():
    return list(flatten(InteractionModel(configs.load("tml_interaction_small")).specs()))


def partition(table, mesh: MeshShape, rules) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    return {path: (s.shape, partition_spec(path, s.shape, s.axes, mesh, rules)) for path, s in table}


@pytest.mark.parametrize("pod", PODS)
def test_every_parameter_lies_where_the_golden_file_says(pod, table):
    places = partition(table, *PODS[pod])
    text = "".join(f"{path} {list(shape)} {tuple(spec)}\n" for path, (shape, spec) in places.items())
    path = GOLDEN / f"{pod}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.is_file(), f"no golden layout of {pod}: run UPDATE_GOLDEN=1 pytest {__file__}"
    assert text == path.read_text(), "a parameter has moved: if this is intended, run with UPDATE_GOLDEN=1 and commit"


@pytest.mark.parametrize(("pod", "most"), [("v5p-512", 1.01), ("tpu7x-512", 1.01), ("h100-64", 1.003)])
def test_training_splits_nearly_all_of_the_model_over_all_devices(pod, most, table):
    mesh, rules = PODS[pod]
    per_device = total = 0
    for shape, spec in partition(table, mesh, rules).values():
        ways = math.prod(mesh.sizes[a] for part in spec for a in axis_names(part))
        total += math.prod(shape)
        per_device += math.prod(shape) // ways
    assert 1.0 <= per_device * mesh.devices / total < most


def test_jax_takes_the_layout_as_a_sharding(table):
    shape = MeshShape(data=32, expert=8)
    mesh = jax.sharding.AbstractMesh(tuple(shape.sizes.values()), tuple(shape.sizes), (AxisType.Explicit,) * 4)
    sharding = {p: jax.sharding.NamedSharding(mesh, spec) for p, (_, spec) in partition(table, shape, TRAIN).items()}
    experts = sharding["layers/block1/run0/mlp/w13"]
    assert experts.shard_shape((7, 3, 256, 2, 4096, 2048)) == (7, 3, 32, 2, 128, 2048)


def test_an_axis_that_does_not_divide_is_named_with_a_remedy(table):
    with pytest.raises(InputError, match=r"mlp/w13: the length 256 of its axis 'expert' .* expert=48.*example 16"):
        partition(table, MeshShape(expert=48), SERVE)
    with pytest.raises(InputError, match=r"length 4096 of its axis 'embed' is not a multiple of data=3 x expert=8"):
        partition(table, MeshShape(data=3, expert=8), TRAIN)


def test_two_axes_on_one_mesh_axis_are_named():
    rules = {**TRAIN, "mlp": ("data",)}
    with pytest.raises(InputError, match=r"w: its axes 'embed' and 'mlp' both lie on the mesh axis 'data'"):
        partition_spec("w", (64, 64), ("embed", "mlp"), MeshShape(), rules)


def test_an_axis_without_a_rule_is_named():
    with pytest.raises(InputError, match=r"w: its axis 'colour' has no rule"):
        partition_spec("w", (64, 64), ("embed", "colour"), MeshShape(), TRAIN)


def test_vectors_are_replicated():
    spec = partition_spec("norm", (2, 5, 64), ("block", "layer", "embed"), MeshShape(data=8), TRAIN)
    assert spec == PartitionSpec()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date=4", "there is no axis 'date'; the axes are replica, data, expert, tensor"),
        ("data=0", "write it as data=16"),
        ("data", "write it as data=16"),
        ("data=-1", "write it as data=16"),
        ("", "it is empty; write it as data=16"),
    ],
)
def test_a_malformed_mesh_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        MeshShape.parse(text)


def test_a_mesh_is_written_as_it_is_read():
    shape = MeshShape(replica=2, data=16, expert=8)
    assert MeshShape.parse(str(shape)) == shape
    assert (shape.devices, shape.batch_shards) == (256, 256)
    assert dataclasses.replace(shape, tensor=2).batch_shards == 256


def test_a_mesh_that_needs_more_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match="needs 4096 devices, there are "):
        make_mesh(MeshShape(data=4096))
    assert make_mesh(MeshShape(data=2), jax.devices()[:2]).axis_types == (AxisType.Explicit,) * 4


@dataclass(frozen=True)
class FakeTpu:
    """What JAX reads of a TPU device to arrange a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def test_slices_are_split_over_replica_first_and_then_over_data(monkeypatch):
    devices = [FakeTpu(4 * s + i, s, (i % 2, i // 2, 0)) for s in range(2) for i in range(4)]
    monkeypatch.setattr("jaxtml.parallel.mesh.Mesh", lambda grid, *_, **__: grid)
    by_replica = make_mesh(MeshShape(replica=2, data=4), devices)
    assert [{device.slice_index for device in part.flat} for part in by_replica] == [{0}, {1}]
    by_data = make_mesh(MeshShape(data=4, expert=2), devices)
    assert [{device.slice_index for device in part.flat} for part in by_data[0]] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError, match="does not fit 2 slices, .* for example replica=2"):
        make_mesh(MeshShape(expert=4, tensor=2), devices)
