"""How a model lies on a mesh: the layout of its parameters, and the parts of them that a device has to fetch.

A program for more than one device runs inside `jax.shard_map`: it sees its part of the batch and its part of every
parameter, gathers a layer's weights just before it uses them (FSDP), and says what it says to other devices by name
(`jaxtml.parallel.collectives`). Called by every module that places something, and by the trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtml.model.spec import Params, ParamSpec
from jaxtml.parallel.collectives import all_gather_parameter
from jaxtml.parallel.mesh import BATCH_AXES, SERVE, TRAIN, MeshShape, Rules, partition_spec

TENSOR = ("tensor",)


@dataclass(frozen=True)
class Placement:
    """Which devices there are, and how tokens reach the experts.

    Attributes:
      mesh: with more than one device, the model runs inside `jax.shard_map`.
      transport: "replicated", "ring" or "ragged" (see `moe`).
      capacity: rows that a device has room for, padding included, as a multiple of its share at perfect balance; None:
        the worst case.
      int8: the routed experts are held as int8 and a scale per column (serving alone).
    """

    mesh: MeshShape = MeshShape()
    transport: str = "ring"
    capacity: float | None = None
    int8: bool = False

    @property
    def session_axes(self) -> tuple[str, ...]:
        """The axes that split the sessions that are served."""
        return BATCH_AXES if self.transport != "replicated" else ("replica", "data")

    @property
    def session_shards(self) -> int:
        """Into how many parts they are split."""
        return math.prod(self.mesh.sizes[axis] for axis in self.session_axes)


SINGLE_DEVICE = Placement()


def partition_specs(table: dict[str, Any], mesh: MeshShape, rules: Rules) -> dict[str, Any]:
    """A `PartitionSpec` for each `ParamSpec` of a table, which names parameters in messages by their path."""

    def one(path: tuple[Any, ...], spec: ParamSpec) -> PartitionSpec:
        return partition_spec("/".join(str(key.key) for key in path), spec.shape, spec.axes, mesh, rules)

    return jax.tree_util.tree_map_with_path(one, table)


def all_gather_parameters(params: Params, table: dict[str, Any], mesh: MeshShape, dtype: Any) -> Params:
    """A device's parts of parameters, laid out by `TRAIN`, as it computes with them (by `SERVE`); gradients go back.

    What travels is cast to `dtype` first, all but the router, whose scores are made in float32.
    """
    if mesh.devices == 1:
        return params
    held, needed = (partition_specs(table, mesh, rules) for rules in (TRAIN, SERVE))

    def one(spec: ParamSpec, array: jax.Array, held: PartitionSpec, needed: PartitionSpec) -> jax.Array:
        if held == needed:
            return array
        array = array if "router" in spec.axes else array.astype(dtype)
        if spec.axes[-4:-2] != ("expert", "gate_up"):
            return all_gather_parameter(array, held, needed)
        # The halves by themselves, as they are used: to cut them out of what has arrived would be to copy it.
        halves = (all_gather_parameter(array[:, i : i + 1], held, needed) for i in (0, 1))
        return jnp.concatenate(list(halves), axis=1)

    return jax.tree.map(one, table, params, held, needed)
