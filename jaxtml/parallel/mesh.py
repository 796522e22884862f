"""The device mesh, and the rules that decide where on it each axis of each parameter lies.

Called by the trainer, the server, `jaxtml plan` and the tests. This file knows names and sizes, not the model.

The mesh always has four axes; an axis that is not used has length 1. All axes but `tensor` split the batch:

- `replica`: complete copies of the model, one per slice; gradients are summed over the slow network.
- `data`: parameters are sharded, and gathered layer by layer (FSDP, Zhao et al., 2023).
- `expert`: the devices hold different routed experts, and tokens travel to their experts. All other parameters are
  sharded over this axis as over `data`.
- `tensor`: attention heads, feed-forward width and vocabulary are split.

A `ParamSpec` names the logical axes of its parameter. `TRAIN` and `SERVE` are the rules: for each logical axis, the
mesh axes that split it. `TRAIN` is the layout in which the trainer stores parameters. `SERVE` is the layout in which
every program computes with parameters. The trainer gathers parameters from `TRAIN` to `SERVE`. The server stores them
in `SERVE` and gathers nothing. A new logical axis needs a rule here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxtml.errors import InputError

AXES = ("replica", "data", "expert", "tensor")
BATCH_AXES = ("replica", "data", "expert")
STACKED = ("block", "layer")  # logical axes of a stack of layers, which is never split

Rules = Mapping[str, tuple[str, ...]]  # logical axis -> the mesh axes that split it

_NEVER_SPLIT = (
    *STACKED,
    *("channel", "conv", "head_dim", "norm", "rel", "extent", "router", "scalar", "gate_up", "shared"),
    *("clock", "dmel", "patch", "patch_hidden", "pair", "merged"),
    *("draft", "flow_condition", "flow_mlp", "flow_mod", "speech", "time"),
    *("kernel", "in", "out"),  # the vocoder
)
SERVE: Rules = {
    **dict.fromkeys(_NEVER_SPLIT, ()),
    "embed": (),
    "expert_embed": (),
    "flow": (),
    "patch_wide": (),
    "expert": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
TRAIN: Rules = {
    **SERVE,
    **dict.fromkeys(("embed", "flow", "patch_wide"), ("data", "expert")),
    "expert_embed": ("data",),
}


@dataclass(frozen=True)
class MeshShape:
    """The length of every mesh axis."""

    replica: int = 1
    data: int = 1
    expert: int = 1
    tensor: int = 1

    @staticmethod
    def parse(text: str) -> MeshShape:
        """Reads a shape such as "data=16,expert=8"; axes that are not named have length 1.

        Raises:
          InputError: the shape is empty, an axis is unknown or named twice, or its length is not a positive integer.
        """
        if not text.strip(", "):
            raise InputError(f"mesh {text!r}: it is empty; write it as data=16,expert=8, or leave it out")
        lengths: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in AXES:
                raise InputError(f"mesh {text!r}: there is no axis {name!r}; the axes are {', '.join(AXES)}")
            if name in lengths:
                raise InputError(f"mesh {text!r}: {name} is named twice")
            if not value.isdecimal() or len(value) > 9 or int(value) < 1:
                raise InputError(f"mesh {text!r}: write it as data=16,expert=8")
            lengths[name] = int(value)
        return MeshShape(**lengths)

    @property
    def sizes(self) -> dict[str, int]:
        """The length of every axis by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def devices(self) -> int:
        """The number of devices in the mesh."""
        return math.prod(self.sizes.values())

    @property
    def batch_shards(self) -> int:
        """The number of parts into which a batch is split."""
        return self.replica * self.data * self.expert

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "one device"


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh of `shape` over `devices` (None: all devices of the job).

    Its axes are explicit. The axes of a mesh of one device are automatic, because a program for one device names none.

    Raises:
      InputError: the number of devices is not what the shape needs, or the shape does not fit several slices of TPUs.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if count != shape.devices:
        raise InputError(
            f"mesh {shape} needs {shape.devices} devices, there are {count}: "
            f"the product of {', '.join(AXES)} has to be {count}"
        )
    axis_types = ((AxisType.Explicit if count > 1 else AxisType.Auto),) * 4
    sizes = tuple(shape.sizes.values())
    tpus = [device for device in (jax.devices() if devices is None else devices) if device.platform == "tpu"]
    slices = len({getattr(device, "slice_index", 0) for device in tpus})
    if slices > 1:
        return Mesh(_grid_of_slices(shape, slices, devices), AXES, axis_types=axis_types)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:  # an axis is not a product of sides of the TPU torus: split a side
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=axis_types)


def _grid_of_slices(shape: MeshShape, slices: int, devices: Sequence[Any] | None) -> np.ndarray:
    """Returns the devices of several slices in the shape of a mesh: `replica` goes over slices first, then `data`.

    Raises:
      InputError: these axes cannot be split over the slices.
    """
    replicas = math.gcd(shape.replica, slices)
    if shape.data % (slices // replicas):
        raise InputError(
            f"mesh {shape} does not fit {slices} slices, which a slow network connects: "
            f"give a replica axis for them, for example replica={slices}"
        )
    over_network = (replicas, slices // replicas, 1, 1)
    inside = tuple(size // part for size, part in zip(shape.sizes.values(), over_network, strict=True))
    return create_hybrid_device_mesh(inside, over_network, devices, allow_split_physical_axes=True)


def axis_names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that split one dimension, from that dimension's part of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else part or ()


def partition_spec(
    name: str, shape: Sequence[int], axes: Sequence[str], mesh: MeshShape, rules: Rules
) -> PartitionSpec:
    """Returns where a parameter lies on the mesh.

    A vector (of each layer, if stacked) is replicated: splitting it saves nothing and costs a collective.

    Args:
      name: the parameter's path, for messages.
      shape: the parameter's shape.
      axes: a logical name for each dimension.
      mesh: lengths of the mesh axes.
      rules: for each logical name, the mesh axes that split it.

    Raises:
      InputError: a logical name has no rule, the same mesh axis splits two dimensions, or the mesh axes cannot split a
        dimension evenly. The message names the parameter, the axis and a remedy.
    """
    if sum(axis not in STACKED for axis in axes) < 2:
        return PartitionSpec()
    parts: list[tuple[str, ...] | str | None] = []
    taken: dict[str, str] = {}
    for size, axis in zip(shape, axes, strict=True):
        if axis not in rules:
            raise InputError(f"{name}: its axis {axis!r} has no rule: add one to jaxtml.parallel.mesh")
        for mesh_axis in rules[axis]:
            if mesh_axis in taken:
                raise InputError(
                    f"{name}: its axes {taken[mesh_axis]!r} and {axis!r} both lie on the mesh axis {mesh_axis!r}: "
                    "give one of them another rule"
                )
            taken[mesh_axis] = axis
        split = tuple(mesh_axis for mesh_axis in rules[axis] if mesh.sizes[mesh_axis] > 1)
        shards = math.prod(mesh.sizes[mesh_axis] for mesh_axis in split)
        if size % shards:
            lengths = " x ".join(f"{mesh_axis}={mesh.sizes[mesh_axis]}" for mesh_axis in split)
            raise InputError(
                f"{name}: the length {size} of its axis {axis!r} is not a multiple of {lengths}: "
                f"choose mesh axes whose product divides {size}, for example {math.gcd(size, shards)}"
            )
        parts.append(split[0] if len(split) == 1 else split or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)
