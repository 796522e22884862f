"""The mesh, and where on it every axis of every parameter lies. Knows names and sizes, no model.

Four axes, always present, of length 1 where unused. All but `tensor` split the batch:

- `replica`: whole copies of the model, across slices; gradients are summed over the slow network.
- `data`: parameters are sharded and gathered layer by layer (FSDP, Zhao et al., 2023).
- `expert`: routed experts live apart, tokens travel; what is not an expert is sharded here as over `data`.
- `tensor`: heads, feed-forward width and vocabulary are split.

`TRAIN` and `SERVE` say, for every logical axis name that a `ParamSpec` may carry, which mesh axes split it. Serving
keeps each weight where it is used and gathers nothing. Called by the trainer, the server, the plan and the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxtml.errors import InputError

AXES = ("replica", "data", "expert", "tensor")
BATCH_AXES = ("replica", "data", "expert")
STACKED = ("block", "layer")  # a stack of layers is never split

Rules = Mapping[str, tuple[str, ...]]

_WHOLE = (
    *STACKED,
    *("channel", "conv", "head_dim", "norm", "rel", "extent", "router", "scalar", "gate_up", "shared"),
    *("clock", "dmel", "patch", "patch_hidden", "pair", "merged"),
    *("flow_condition", "flow_mlp", "flow_mod", "speech", "time"),
    *("kernel", "in", "out"),  # the vocoder
)
SERVE: Rules = {
    **dict.fromkeys(_WHOLE, ()),
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
    """Length of every mesh axis."""

    replica: int = 1
    data: int = 1
    expert: int = 1
    tensor: int = 1

    @staticmethod
    def parse(text: str) -> MeshShape:
        """`"data=16,expert=8"` -> the shape; axes that are not named are 1.

        Raises:
          InputError: an unknown axis, or a length that is no positive integer.
        """
        lengths: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in AXES:
                raise InputError(f"mesh {text!r}: no axis {name!r}; there are {', '.join(AXES)}")
            if name in lengths:
                raise InputError(f"mesh {text!r}: {name} is named twice")
            if not value.isdecimal() or len(value) > 9 or int(value) < 1:
                raise InputError(f"mesh {text!r}: write it as data=16,expert=8")
            lengths[name] = int(value)
        return MeshShape(**lengths)

    @property
    def sizes(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return self.replica * self.data * self.expert

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "one device"


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with explicit axes over `devices` (None: all there are); of one device, whose programs name no axes, with
    automatic ones.

    Raises:
      InputError: there are not as many devices as the shape needs.
    """
    found = len(devices) if devices is not None else jax.device_count()
    if found != shape.devices:
        raise InputError(
            f"mesh {shape} needs {shape.devices} devices, there are {found}: "
            f"the product of {', '.join(AXES)} has to be {found}"
        )
    kinds, sizes = ((AxisType.Explicit if found > 1 else AxisType.Auto),) * 4, tuple(shape.sizes.values())
    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # no axis is a product of the torus' sides
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=kinds)


def axis_names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one part of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else part or ()


def partition_spec(
    name: str, shape: Sequence[int], axes: Sequence[str], mesh: MeshShape, rules: Rules
) -> PartitionSpec:
    """Where a parameter lies. Vectors are whole everywhere: splitting them saves nothing and costs a collective.

    Args:
      name: the parameter's path, for messages.
      shape: its shape.
      axes: a logical name per dimension.
      mesh: lengths of the mesh axes.
      rules: mesh axes of every logical name.

    Raises:
      InputError: a logical name without a rule, two dimensions on one mesh axis, or a dimension that does not divide;
        the message names parameter, axis and remedy.
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
        used = tuple(mesh_axis for mesh_axis in rules[axis] if mesh.sizes[mesh_axis] > 1)
        ways = math.prod(mesh.sizes[mesh_axis] for mesh_axis in used)
        if size % ways:
            told = " x ".join(f"{mesh_axis}={mesh.sizes[mesh_axis]}" for mesh_axis in used)
            raise InputError(
                f"{name}: its axis {axis!r} of {size} does not divide by {told}: "
                f"choose a divisor of {size}, as {math.gcd(size, ways)}"
            )
        parts.append(used[0] if len(used) == 1 else used or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)
