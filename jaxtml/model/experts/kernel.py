"""Grouped matrix products for serving: experts are read where they stand in the stack of layers, int8 too (TPU, GPU).

Axes: R rows, G blocks of B rows, X experts of all layers of the stack, H halves (gate and up, or one), K width that is
summed over, N columns. Every block of rows belongs to one expert. A library's kernel takes the weights of one layer:
to cut those out of the stack is to copy them, 1.6 GB a layer and device for the model that this is written for. Only
experts that have rows are read, on a TPU each once per pass over its columns. Called by `grouped`; no gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from jaxtml.parallel.chips import TPU_LANES

TILE_BYTES = 2**22  # of weights on their way into a TPU's fast memory, twice, at most
GPU_TILE = 64  # edge of a tile of weights on a GPU
GPU_ROWS = 16  # the least that its matrix units take


def grouped_matmul(
    rows: jax.Array,
    owner: jax.Array,
    used: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    at: tuple[jax.Array, ...],
    expected: int,
    platform: str,
    interpret: bool = False,
) -> jax.Array:
    """`rows @ weights` of the block's owner; with two halves `silu(rows @ gate) * (rows @ up)`.

    Args:
      rows: `[R, K]`, K a multiple of 128.
      owner: `[G]` int32, the expert of each block, not falling. A block's height is a power of two.
      used: int32, blocks in use.
      weights: `[*stack, E, H, K, N]`, N a multiple of 128, in the dtype of `rows` or int8.
      scale: `[*stack, E, H, N]` float32, what int8 columns are multiplied by; None: nothing.
      at: which layer of the stack.
      expected: rows in use where the load is even, for the compiler's and the plan's estimates.
      platform: "tpu" or "cuda".
      interpret: run it as plain operations, where there is neither.

    Returns:
      `[R, N]` in the dtype of `rows`; anything in blocks behind those in use.
    """
    *stack, experts, halves, depth, columns = weights.shape
    layer = jnp.zeros((), jnp.int32)
    for size, index in zip(stack, at, strict=True):
        layer = layer * size + index
    block = len(rows) // len(owner)
    given: list[Any] = [rows, weights.reshape(math.prod(stack) * experts, halves, depth, columns)]
    if scale is not None:
        given.append(scale.reshape(-1, halves, 1, columns))
    estimate = pl.CostEstimate(
        flops=2 * expected * depth * columns * halves,
        bytes_accessed=min(experts, expected // block) * halves * depth * columns * weights.dtype.itemsize,
        transcendentals=expected * columns * (halves - 1),
    )
    call = {"tpu": _on_tpu, "cuda": _on_gpu}[platform]
    return call(layer * experts + owner, used, given, cost_estimate=estimate, interpret=interpret)


def _on_tpu(expert: jax.Array, used: jax.Array, given: list[jax.Array], **how: Any) -> jax.Array:
    """`expert` `[G]` of each block among those of all layers; `given` rows, weights and perhaps their scales."""
    rows, weights, *scale = given
    _, halves, depth, columns = weights.shape
    block = len(rows) // len(expert)
    tile = _tile(columns, halves * depth * weights.dtype.itemsize)
    # A block behind those in use asks for what the last one had: nothing is fetched for it.
    place = jnp.minimum(jnp.arange(len(expert)), jnp.maximum(used - 1, 0)).astype(jnp.int32)

    def of_expert(n: Any, g: Any, place: Any, expert: Any, used: Any) -> tuple[Any, ...]:
        return expert[g], 0, 0, n

    specs = [
        pl.BlockSpec((block, depth), lambda n, g, place, expert, used: (place[g], 0)),
        pl.BlockSpec((1, halves, depth, tile), of_expert),
    ]
    if scale:
        specs.append(pl.BlockSpec((1, halves, 1, tile), of_expert))
    return pl.pallas_call(
        partial(_tpu_kernel, halves),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns // tile, len(expert)),
            in_specs=specs,
            out_specs=pl.BlockSpec((block, tile), lambda n, g, place, expert, used: (place[g], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(rows), columns), rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        **how,
    )(place, expert[place].astype(jnp.int32), used.reshape(1).astype(jnp.int32), *given)


def _tile(columns: int, column_bytes: int) -> int:
    """The widest tile of columns that divides them and keeps within `TILE_BYTES`, at least one register wide."""
    lanes = columns // TPU_LANES
    fitting = (n for n in range(lanes, 0, -1) if lanes % n == 0 and n * TPU_LANES * column_bytes <= TILE_BYTES)
    return next(fitting, 1) * TPU_LANES


def _tpu_kernel(halves: int, place: Any, expert: Any, used: Any, rows: Any, weights: Any, *rest: Any) -> None:
    del place, expert
    *scale, out = rest

    @pl.when(pl.program_id(1) < used[0])
    def _():
        def product(half: int) -> Any:
            tile = weights[0, half].astype(rows.dtype)
            found = jax.lax.dot(rows[...], tile, preferred_element_type=jnp.float32)
            return found * scale[0][0, half] if scale else found

        found = product(0)
        if halves == 2:
            found = jax.nn.silu(found) * product(1)
        out[...] = found.astype(out.dtype)


def _on_gpu(expert: jax.Array, used: jax.Array, given: list[jax.Array], **how: Any) -> jax.Array:
    """As `_on_tpu`. Blocks of one expert stand side by side in the grid: the second finds its weights in the cache."""
    rows, weights, *_ = given
    blocks, columns = len(expert), weights.shape[-1]
    block = len(rows) // blocks
    if block < GPU_ROWS:
        higher = jnp.pad(rows.reshape(blocks, block, -1), ((0, 0), (0, GPU_ROWS - block), (0, 0)))
        found = _on_gpu(expert, used, [higher.reshape(blocks * GPU_ROWS, -1), *given[1:]], **how)
        return found.reshape(blocks, GPU_ROWS, columns)[:, :block].reshape(-1, columns)
    return pl.pallas_call(
        partial(_gpu_kernel, block),
        grid=(columns // GPU_TILE, blocks),
        out_shape=jax.ShapeDtypeStruct((len(rows), columns), rows.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4 if block < TPU_LANES else 8, num_stages=3),
        **how,
    )(expert.astype(jnp.int32), used.reshape(1).astype(jnp.int32), *given)


def _gpu_kernel(block: int, expert: Any, used: Any, rows: Any, weights: Any, *rest: Any) -> None:
    *scale, out = rest
    _, halves, depth, _ = weights.shape
    n, g = pl.program_id(0), pl.program_id(1)

    @pl.when(g < used[0])
    def _():
        own, columns = pl.ds(g * block, block), pl.ds(n * GPU_TILE, GPU_TILE)

        def part(k: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
            across = pl.ds(k * GPU_TILE, GPU_TILE)
            given = rows[own, across]

            def product(half: int) -> Any:
                tile = weights[expert[g], half, across, columns].astype(given.dtype)
                return jax.lax.dot(given, tile, preferred_element_type=jnp.float32)

            return tuple(total + product(half) for half, total in enumerate(sums))

        nothing = (jnp.zeros((block, GPU_TILE), jnp.float32),) * halves
        found = jax.lax.fori_loop(0, depth // GPU_TILE, part, nothing)
        if scale:
            found = tuple(total * scale[0][expert[g], half, 0, columns] for half, total in enumerate(found))
        result = found[0] if halves == 1 else jax.nn.silu(found[0]) * found[1]
        out[own, columns] = result.astype(out.dtype)
