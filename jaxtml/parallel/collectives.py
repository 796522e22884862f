"""What the programs of a mesh's devices say to each other, inside `jax.shard_map`. Knows axis names, no model.

All are written for `check_vma=False`, where the transpose of a `psum` is a `psum`: `psum_backward` and `psum_forward`
are the pair that is right for values which every device of an axis holds alike (the f and g of Megatron-LM, Shoeybi et
al., 2019); `all_gather_last` completes what they then all use alike. Each is the identity over axes of length 1, so
that a program for one device has no axes at all.

On a CPU sums are taken in the order of the devices: over processes it would be Gloo's order, and a run that goes on
with another number of them would not be what it had been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtml.parallel.mesh import MeshShape, axis_names


def used(mesh: MeshShape, axes: Sequence[str]) -> tuple[str, ...]:
    """The axes among `axes` that have more than one device."""
    return tuple(axis for axis in axes if mesh.sizes[axis] > 1)


def _added(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Sum over the devices of `names`; not to be differentiated."""
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jax.lax.all_gather(x, names).sum(axis=0),
        default=lambda x: jax.lax.psum(x, names),
    )


def _scatter_added(x: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
    """This device's part, cut from dimension `dim`, of the sum over the devices of `names`."""

    def in_order(x: jax.Array) -> jax.Array:
        ways = math.prod(jax.lax.axis_size(name) for name in names)
        parts = x.reshape(*x.shape[:dim], ways, -1, *x.shape[dim + 1 :])
        parts = jnp.moveaxis(parts, dim, 0)
        return jax.lax.all_to_all(parts, names, 0, 0, tiled=True).sum(axis=0)

    def scattered(x: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)

    return jax.lax.platform_dependent(x, cpu=in_order, default=scattered)


def all_gather(x: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
    """The parts of the devices of `names` side by side in dimension `dim`; gradients are summed and scattered back."""
    return _gather(x, names, dim)


def reduce_scatter(x: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
    """This device's part, cut from dimension `dim`, of the sum over the devices of `names`: the adjoint of
    `all_gather`."""
    return _scatter(x, names, dim)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
    return jax.lax.all_gather(x, names, axis=dim, tiled=True)


_gather.defvjp(lambda x, names, dim: (_gather(x, names, dim), None),
               lambda names, dim, _, grad: (_scatter_added(grad, names, dim),))  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scatter(x: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
    return _scatter_added(x, names, dim)


_scatter.defvjp(lambda x, names, dim: (_scatter(x, names, dim), None),
                lambda names, dim, _, grad: (_gather(grad, names, dim),))  # fmt: skip


def psum(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Sum over the devices of `axes`; not to be differentiated."""
    names = used(mesh, axes)
    return _added(x, names) if names else x


def pmax(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Maximum over the devices of `axes`; no gradient passes."""
    names = used(mesh, axes)
    x = jax.lax.stop_gradient(x)
    return jax.lax.pmax(x, names) if names else x


def psum_backward(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """A value that is the same on all devices of `axes` and that each uses for its part: gradients are summed."""
    names = used(mesh, axes)
    return _spread(x, names) if names else x


def psum_forward(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """The sum of the parts that the devices of `axes` hold: the same everywhere, each part with the whole gradient."""
    names = used(mesh, axes)
    return _merge(x, names) if names else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return x


_spread.defvjp(lambda x, names: (x, None), lambda names, _, grad: (_added(grad, names),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _merge(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return _added(x, names)


_merge.defvjp(lambda x, names: (_added(x, names), None), lambda names, _, grad: (grad,))


def all_gather_last(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """The last dimension whole, from the parts of the devices of `axes`, which then all do the same with it."""
    names = used(mesh, axes)
    return _joined(x, names) if names else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joined(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, names, axis=x.ndim - 1, tiled=True)


def _joined_bwd(names: tuple[str, ...], size: int, grad: jax.Array) -> tuple[jax.Array]:
    start = jax.lax.axis_index(names) * size
    return (jax.lax.dynamic_slice_in_dim(grad, start, size, axis=grad.ndim - 1),)


_joined.defvjp(lambda x, names: (_joined(x, names), x.shape[-1]), _joined_bwd)


def all_gather_parameter(x: jax.Array, held: PartitionSpec, needed: PartitionSpec) -> jax.Array:
    """A device's part of a parameter, laid out as `held`, as the larger part `needed`; gradients are scattered back.

    Only the axes that `needed` lacks are gathered (the last ones of a dimension, as in ("expert", "data")).
    """
    for dim, names in enumerate(held):
        keep = axis_names(needed[dim] if dim < len(needed) else None)
        more = tuple(name for name in axis_names(names) if name not in keep)
        if more:
            x = all_gather(x, more, dim)
    return x
