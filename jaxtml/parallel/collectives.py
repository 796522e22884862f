"""What the programs of a mesh's devices say to each other, inside `jax.shard_map`. Knows axis names, no model.

All are written for `check_vma=False`, where the transpose of a `psum` is a `psum`: `spread` and `merge` are the pair
that is right for values which every device of an axis holds alike (the f and g of Megatron-LM, Shoeybi et al., 2019);
`joined` completes what they then all use alike.
Each is the identity over axes of length 1, so that a program for one device has no axes at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
from jax.sharding import PartitionSpec

from jaxtml.parallel.mesh import MeshShape, names_of


def used(mesh: MeshShape, axes: Sequence[str]) -> tuple[str, ...]:
    """The axes among `axes` that have more than one device."""
    return tuple(axis for axis in axes if mesh.sizes[axis] > 1)


def total(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Sum over the devices of `axes`; not to be differentiated."""
    names = used(mesh, axes)
    return jax.lax.psum(x, names) if names else x


def largest(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """Maximum over the devices of `axes`; no gradient passes."""
    names = used(mesh, axes)
    x = jax.lax.stop_gradient(x)
    return jax.lax.pmax(x, names) if names else x


def spread(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """A value that is the same on all devices of `axes` and that each uses for its part: gradients are summed."""
    names = used(mesh, axes)
    return _spread(x, names) if names else x


def merge(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
    """The sum of the parts that the devices of `axes` hold: the same everywhere, each part with the whole gradient."""
    names = used(mesh, axes)
    return _merge(x, names) if names else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return x


_spread.defvjp(lambda x, names: (x, None), lambda names, _, grad: (jax.lax.psum(grad, names),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _merge(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, names)


_merge.defvjp(lambda x, names: (jax.lax.psum(x, names), None), lambda names, _, grad: (grad,))


def joined(x: jax.Array, mesh: MeshShape, axes: Sequence[str]) -> jax.Array:
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


def gathered(x: jax.Array, held: PartitionSpec, needed: PartitionSpec) -> jax.Array:
    """A device's part of a parameter, laid out as `held`, as the larger part `needed`; gradients are scattered back.

    Only the axes that `needed` lacks are gathered (the last ones of a dimension, as in ("expert", "data")).
    """
    for dim, names in enumerate(held):
        keep = names_of(needed[dim] if dim < len(needed) else None)
        more = tuple(name for name in names_of(names) if name not in keep)
        if more:
            x = jax.lax.all_gather(x, more, axis=dim, tiled=True)
    return x
