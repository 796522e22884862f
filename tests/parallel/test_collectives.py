"""Collectives give what their definitions say, on eight devices of a CPU."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtml.parallel.collectives import all_gather_sums
from jaxtml.parallel.mesh import MeshShape, make_mesh


@pytest.mark.parametrize("columns", [8, 7])  # 7: the devices of `tensor` cannot share the columns evenly
@pytest.mark.parametrize(
    "shape", [MeshShape(expert=2, tensor=4), MeshShape(expert=8), MeshShape(data=2, expert=2, tensor=2)], ids=str
)
def test_a_sum_over_tensor_and_a_known_array_are_gathered_over_expert(shape, columns):
    rng = np.random.default_rng(0)
    groups = shape.data * shape.expert
    parts = rng.normal(size=(shape.tensor, 3 * groups, 2, columns)).astype(np.float32)
    known = rng.normal(size=(3 * groups, 2, columns)).astype(np.float32)

    def gather(part, known):
        return all_gather_sums(part[0], known, shape)

    rows, mesh = ("data", "expert"), make_mesh(shape)
    specs = (P("tensor", rows), P(rows))
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip((parts, known), specs, strict=True)]
        run = jax.shard_map(gather, in_specs=specs, out_specs=P("data"), check_vma=False)
        sums, gathered = jax.jit(run)(*arrays)
    np.testing.assert_array_equal(gathered, known)
    in_order = parts[0]
    for part in parts[1:]:
        in_order = in_order + part
    np.testing.assert_array_equal(sums, in_order)
    for array in (sums, gathered):  # each device has the result, not only the first
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])
