"""Collectives between the devices of a mesh, for programs inside `jax.shard_map`. They know axis names, not models.

Called by every module of the model that shares work over the mesh, and by the training step. An argument called `axes`
holds names of mesh axes (`jaxtml.parallel.mesh`). The functions that take a mesh leave out axes of length 1, so a
program for one device contains no collective.

All collectives are written for `check_vma=False`, where JAX takes a `psum` as the transpose of a `psum`. That transpose
is wrong for a value that is the same on all devices of an axis. `psum_backward` and `psum_forward` are the pair that is
right for such values (f and g of Megatron-LM, Shoeybi et al., 2019). `all_gather_last` is for a gathered value from
which all devices compute the same results.

On a CPU, the sums here exchange their terms and add them in the order of the devices. JAX's own collectives would let
Gloo add the terms, in an order that depends on the number of processes. A run that is resumed with another number of
processes would then give other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtml.parallel.mesh import MeshShape, axis_names


def _split_axes(mesh: MeshShape, axes: Sequence[str]) -> tuple[str, ...]:
    """Returns those of `axes` that have more than one device."""
    return tuple(axis for axis in axes if mesh.sizes[axis] > 1)


def _psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sums over the devices of `axes`; must not be differentiated."""
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jax.lax.all_gather(x, axes).sum(axis=0),
        default=lambda x: jax.lax.psum(x, axes),
    )


def _psum_scatter(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Returns this device's part, cut from dimension `dim`, of the sum over the devices of `axes`."""

    def sum_in_order(x: jax.Array) -> jax.Array:
        devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
        parts = x.reshape(*x.shape[:dim], devices, -1, *x.shape[dim + 1 :])
        parts = jnp.moveaxis(parts, dim, 0)
        return jax.lax.all_to_all(parts, axes, 0, 0, tiled=True).sum(axis=0)

    def psum_scatter(x: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)

    return jax.lax.platform_dependent(x, cpu=sum_in_order, default=psum_scatter)


def all_gather(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Concatenates the parts of the devices of `axes` along dimension `dim`.

    The gradient is the adjoint: a `reduce_scatter`.
    """
    return _all_gather(x, axes, dim)


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Sums over the devices of `axes` and returns this device's part, cut from dimension `dim`.

    The gradient is the adjoint: an `all_gather`.
    """
    return _reduce_scatter(x, axes, dim)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


_all_gather.defvjp(lambda x, axes, dim: (_all_gather(x, axes, dim), None),
                   lambda axes, dim, _, grad: (_psum_scatter(grad, axes, dim),))  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reduce_scatter(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    return _psum_scatter(x, axes, dim)


_reduce_scatter.defvjp(lambda x, axes, dim: (_reduce_scatter(x, axes, dim), None),
                       lambda axes, dim, _, grad: (_all_gather(grad, axes, dim),))  # fmt: skip


def psum(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Sums over the devices of `axes`; must not be differentiated."""
    split = _split_axes(mesh, axes)
    return _psum(x, split) if split else x


def pmax(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Returns the maximum over the devices of `axes`; no gradient passes."""
    split = _split_axes(mesh, axes)
    x = jax.lax.stop_gradient(x)
    return jax.lax.pmax(x, split) if split else x


def psum_backward(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Returns `x` unchanged and sums its gradient over the devices of `axes` (Megatron's f).

    For a value that is the same on all devices of `axes` and from which each device computes its own share.
    """
    split = _split_axes(mesh, axes)
    return _psum_backward(x, split) if split else x


def psum_forward(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Sums the shares of the devices of `axes` and passes the gradient on unchanged (Megatron's g).

    The sum is the same on all devices, and each share receives the full gradient.
    """
    split = _split_axes(mesh, axes)
    return _psum_forward(x, split) if split else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _psum_backward(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return x


_psum_backward.defvjp(lambda x, axes: (x, None), lambda axes, _, grad: (_psum(grad, axes),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _psum_forward(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return _psum(x, axes)


_psum_forward.defvjp(lambda x, axes: (_psum(x, axes), None), lambda axes, _, grad: (grad,))


def all_gather_last(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Concatenates the parts of the devices of `axes` along the last dimension.

    All devices must compute the same values from the result. Then all devices have the same gradient. Each device keeps
    its own part of this gradient, and nothing is summed.
    """
    split = _split_axes(mesh, axes)
    return _all_gather_last(x, split) if split else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather_last(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True)


def _all_gather_last_bwd(axes: tuple[str, ...], size: int, grad: jax.Array) -> tuple[jax.Array]:
    start = jax.lax.axis_index(axes) * size
    return (jax.lax.dynamic_slice_in_dim(grad, start, size, axis=grad.ndim - 1),)


_all_gather_last.defvjp(lambda x, axes: (_all_gather_last(x, axes), x.shape[-1]), _all_gather_last_bwd)


def all_gather_sums(part: jax.Array, known: jax.Array, mesh: MeshShape) -> tuple[jax.Array, jax.Array]:
    """Sums one array over `tensor`, and gathers it and another array over `expert`, with one all_gather.

    The devices of `tensor` share the sending of `known`: each sends a part of its columns. The terms of the sum are
    added in float32, in the order of the devices. Must not be differentiated.

    Args:
      part: `[B, T, D]`, this device's part of a sum over `tensor`; other devices of `expert` have other rows.
      known: `[B, T, D]` in the dtype of `part`, the same on all devices of `tensor`.
      mesh: its P devices of `expert` have the P B rows.

    Returns:
      The sum and the gathered `known`, `[P B, T, D]` each, the same on all devices of `expert` and `tensor`.
    """
    axes, columns, shards = _split_axes(mesh, ("expert", "tensor")), part.shape[-1], mesh.tensor
    width = -(-columns // shards)
    if shards > 1:
        known = jnp.pad(known, [*[(0, 0)] * (known.ndim - 1), (0, width * shards - columns)])
        known = own_part(known, mesh, "tensor", dim=-1)
    gathered = jax.lax.all_gather(jnp.concatenate([part, known], axis=-1), axes)
    gathered = gathered.reshape(mesh.expert, shards, *gathered.shape[1:])
    sums = gathered[..., :columns].astype(jnp.float32).sum(axis=1).astype(part.dtype)
    known = jnp.moveaxis(gathered[..., columns:], 1, -2).reshape(*sums.shape[:-1], -1)[..., :columns]
    return sums.reshape(-1, *part.shape[1:]), known.reshape(-1, *part.shape[1:])


def own_part(x: jax.Array, mesh: MeshShape, axis: str, dim: int = 0) -> jax.Array:
    """Returns the part of `x` that belongs to this device of the mesh axis `axis`, cut from dimension `dim`."""
    size = x.shape[dim] // mesh.sizes[axis]
    return jax.lax.dynamic_slice_in_dim(x, size * jax.lax.axis_index(axis), size, dim % x.ndim)


def all_gather_parameter(x: jax.Array, stored: PartitionSpec, needed: PartitionSpec) -> jax.Array:
    """Returns a device's part of a parameter in the layout `needed`, gathered from the parts in the layout `stored`.

    Gathers over the mesh axes that split a dimension in `stored` but not in `needed`. These axes must be the last ones
    of their dimension: ("expert", "data") can become ("expert",). Gradients are summed and scattered back.
    """
    for dim, part in enumerate(stored):
        keep = axis_names(needed[dim] if dim < len(needed) else None)
        missing = tuple(axis for axis in axis_names(part) if axis not in keep)
        if missing:
            x = all_gather(x, missing, dim)
    return x
