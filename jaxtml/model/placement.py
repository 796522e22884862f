"""How a model lies on a mesh: the layout of its parameters, and how a device gathers the parts that it needs.

A program for more than one device runs inside `jax.shard_map`. It sees its part of the batch and its part of every
parameter. It gathers a layer's weights just before it uses them (FSDP), and communicates through collectives by name
(`jaxtml.parallel.collectives`). Called by every module of the model that shards something, and by the trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtml.model.spec import Params, ParamSpec, SpecTable
from jaxtml.parallel.collectives import all_gather_parameter
from jaxtml.parallel.mesh import BATCH_AXES, SERVE, TRAIN, MeshShape, Rules, partition_spec

TENSOR = ("tensor",)  # the mesh axis that splits heads, feed-forward width and vocabulary, as collectives take it


@dataclass(frozen=True)
class Placement:
    """The mesh on which a model runs, and how tokens reach the experts.

    Attributes:
      mesh: with more than one device, the model runs inside `jax.shard_map`.
      transport: "replicated", "ring" or "ragged" (see `jaxtml.model.experts.transports`).
      capacity: the size of a device's expert buffer. The unit is the number of rows that each device receives if all
        experts have the same load. Padding rows use up capacity too. None: enough rows for the worst case.
      int8: the routed experts are stored as int8 with one scale per column. For serving only.
    """

    mesh: MeshShape = MeshShape()
    transport: str = "ring"
    capacity: float | None = None
    int8: bool = False

    @property
    def session_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the sessions of a server."""
        return BATCH_AXES if self.transport != "replicated" else ("replica", "data")

    @property
    def session_shards(self) -> int:
        """The number of parts into which the sessions of a server are split."""
        return math.prod(self.mesh.sizes[axis] for axis in self.session_axes)


SINGLE_DEVICE = Placement()


def partition_specs(table: SpecTable, mesh: MeshShape, rules: Rules) -> dict[str, Any]:
    """Returns a `PartitionSpec` for each `ParamSpec` of a table, in the shape of the table.

    Raises:
      InputError: a parameter does not fit the mesh (see `partition_spec`); the message has the parameter's path.
    """

    def partition(path: tuple[Any, ...], spec: ParamSpec) -> PartitionSpec:
        return partition_spec("/".join(str(key.key) for key in path), spec.shape, spec.axes, mesh, rules)

    return jax.tree_util.tree_map_with_path(partition, table)


def all_gather_parameters(params: Params, table: SpecTable, mesh: MeshShape, dtype: jnp.dtype) -> Params:
    """Gathers a device's parts of parameters from the layout of `TRAIN` to the layout of `SERVE`.

    The gathered parameters are cast to `dtype` before they travel. The router is not cast, because its scores are
    computed in float32. Gradients are summed and scattered back.
    """
    if mesh.devices == 1:
        return params
    stored, needed = (partition_specs(table, mesh, rules) for rules in (TRAIN, SERVE))

    def gather(spec: ParamSpec, array: jax.Array, stored: PartitionSpec, needed: PartitionSpec) -> jax.Array:
        if stored == needed:
            return array
        array = array if "router" in spec.axes else array.astype(dtype)
        if spec.axes[-4:-2] != ("expert", "gate_up"):
            return all_gather_parameter(array, stored, needed)
        # The experts use gate and up separately, so they are gathered separately: to cut them apart afterwards would
        # copy what has arrived.
        halves = (all_gather_parameter(array[:, i : i + 1], stored, needed) for i in (0, 1))
        return jnp.concatenate(list(halves), axis=1)

    return jax.tree.map(gather, table, params, stored, needed)
