"""Gradients of a batch. Each device works on its own rows, cut into `accumulate` parts, and all results are summed.

On a mesh this is one program per device inside `jax.shard_map`. `TRAIN` (`jaxtml.parallel.mesh`) says how
parameters and gradients are sharded; the batch is split over `BATCH_AXES`. Called by `jaxtml.train.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtml.config import TrainConfig
from jaxtml.errors import InputError
from jaxtml.model.experts.routing import MoEStats
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import partition_specs
from jaxtml.model.spec import Params
from jaxtml.parallel.collectives import psum
from jaxtml.parallel.mesh import BATCH_AXES, TRAIN, MeshShape, axis_names
from jaxtml.train.loss import Batch, Terms, count_positions, loss_fn


class Gradients(NamedTuple):
    """The results of one batch.

    Attributes:
      terms: the loss terms by name; their weighted sum "loss"; the norm of the gradients "grad_norm".
      stats: one entry for each group of consecutive MoE layers (`runs` in the backbone's blocks).
      gradients: in the shape of the parameter tree.
    """

    terms: Terms
    stats: list[MoEStats]
    gradients: Params


LossAndGradients = tuple[tuple[jax.Array, tuple[Terms, list[MoEStats]]], Params]
"""What `jax.value_and_grad` of the loss returns: `((loss, (terms, stats)), gradients)`."""


def check_batch(config: TrainConfig, mesh: MeshShape) -> None:
    """Raises `InputError` where a batch cannot be split evenly over the devices and their `accumulate` parts."""
    parts = mesh.batch_shards * config.accumulate
    if config.batch % parts:
        raise InputError(
            f"train.batch {config.batch} is not a multiple of {parts}, the number of parts that mesh {mesh} and "
            f"train.accumulate {config.accumulate} make: name another --mesh, or set another train.batch"
        )


def make_gradients(model: InteractionModel) -> Callable[[Params, Batch, jax.Array], Gradients]:
    """Returns `gradients(params, batch, key) -> Gradients`. On a mesh, call it under `jax.set_mesh`."""
    mesh = model.placement.mesh
    specs = partition_specs(model.specs(), mesh, TRAIN)
    parts = model.config.train.accumulate

    def device_gradients(params: Params, batch: Batch, key: jax.Array) -> Gradients:
        row_keys, counts = _row_keys(key, len(batch["kind"]), mesh), count_positions(batch, mesh)

        def part_gradients(batch: Batch, row_keys: jax.Array) -> LossAndGradients:
            return jax.value_and_grad(lambda p: loss_fn(model, p, batch, row_keys, counts), has_aux=True)(params)

        if parts == 1:
            (loss, (terms, stats)), grads = part_gradients(batch, row_keys)
        else:
            (loss, (terms, stats)), grads = _sum_over_parts(part_gradients, parts, batch, row_keys)
        terms, stats = jax.tree.map(lambda x: psum(x, mesh, BATCH_AXES), ({"loss": loss, **terms}, stats))
        grads = jax.tree.map(lambda grad, spec: _psum_gradient(grad, spec, mesh), grads, specs)
        return Gradients({**terms, "grad_norm": _norm(grads, specs, mesh)}, stats, grads)

    if mesh.devices == 1:
        return device_gradients
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        device_gradients,
        in_specs=(specs, rows, PartitionSpec()),
        out_specs=Gradients(PartitionSpec(), PartitionSpec(), specs),  # pyright: ignore[reportArgumentType]
        check_vma=False,
    )


def _row_keys(key: jax.Array, rows: int, mesh: MeshShape) -> jax.Array:
    """Returns a random key for each of this device's rows. It depends on the row's number in the whole batch."""
    first = jnp.zeros((), jnp.int32)
    for axis in BATCH_AXES:
        first = first * mesh.sizes[axis] + (jax.lax.axis_index(axis) if mesh.devices > 1 else 0)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first * rows + jnp.arange(rows))


def _sum_over_parts(
    part_gradients: Callable[[Batch, jax.Array], LossAndGradients], parts: int, batch: Batch, row_keys: jax.Array
) -> LossAndGradients:
    """Cuts the rows into `parts`, runs `part_gradients` on one after the other, and sums the results in float32."""
    cut = jax.tree.map(lambda a: jnp.asarray(a).reshape(parts, len(a) // parts, *a.shape[1:]), (batch, row_keys))
    shapes = jax.eval_shape(lambda c: part_gradients(*jax.tree.map(lambda a: a[0], c)), cut)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
    sums, _ = jax.lax.scan(lambda sums, c: (jax.tree.map(jnp.add, sums, part_gradients(*c)), None), zeros, cut)
    return jax.tree.map(lambda a, s: a.astype(s.dtype), sums, shapes)


def _psum_gradient(grad: jax.Array, spec: PartitionSpec, mesh: MeshShape) -> jax.Array:
    """Sums a gradient over the batch axes that do not split the parameter.

    Over the batch axes that do split the parameter, the backward pass has summed the gradient already: the backward
    pass of an all_gather is a reduce_scatter.
    """
    return psum(grad, mesh, [axis for axis in BATCH_AXES if axis not in _split_axes(spec)])


def _split_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the mesh axes over which a parameter is split."""
    return tuple(name for part in spec for name in axis_names(part))


def _norm(grads: Params, specs: Any, mesh: MeshShape) -> jax.Array:
    """Returns the norm of all gradients together. `grads` is this device's part of the gradients."""
    squares: dict[tuple[str, ...], jax.Array] = {}
    for grad, spec in zip(jax.tree.leaves(grads), jax.tree.leaves(specs), strict=True):
        axes = _split_axes(spec)
        squares[axes] = squares.get(axes, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return jnp.sqrt(sum(psum(squares[axes], mesh, axes) for axes in sorted(squares)))
