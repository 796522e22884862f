"""Grouped matrix products for serving, as kernels for TPU and GPU that read experts where they are in the stack.

Axes: R rows, G blocks of B rows, X experts of all layers of the stack, H halves (gate and up, or one), K width that is
summed over, N columns. Called by `grouped`; there is no gradient.

Every block of rows belongs to one expert. The kernels of libraries take the weights of one layer, and cutting a layer
out of the stack copies it. For the 276B model on eight devices, the copy has 1.6 GB per layer and device.

Weights may be int8. Only experts that have rows are read. On a TPU, each weight of such an expert is read once, even if
the expert has several blocks of rows.
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

Ref = Any  # a reference to a block of an array in the memory of a kernel; the class `jax.Ref` is not typed as one

MAX_TILE_BYTES = 2**22  # bytes of a tile of weights; a TPU has two tiles on their way into its fast memory
GPU_TILE = 64  # the edge of a tile of weights on a GPU
GPU_ROWS = 16  # the fewest rows that a GPU's matrix units take


def grouped_matmul(
    rows: jax.Array,
    owner: jax.Array,
    used: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    layer_index: tuple[jax.Array, ...],
    expected: int,
    platform: str,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each block of rows with the weights of its expert.

    With one half, the result is `rows @ weights`; with two halves it is `silu(rows @ gate) * (rows @ up)`.

    Args:
      rows: `[R, K]`; K is a multiple of 128.
      owner: `[G]` int32, the expert of each block in ascending order; the rows of a block are a power of two.
      used: int32, the number of blocks in use.
      weights: `[*stack, E, H, K, N]` in the dtype of `rows` or int8; N is a multiple of 128.
      scale: `[*stack, E, H, N]` float32, the factors of int8 columns; None: the weights are not int8.
      layer_index: the index of the layer in the stack.
      expected: the rows in use when the load is even, for the estimates of the compiler and of `jaxtml plan`.
      platform: "tpu" or "cuda".
      interpret: run the kernel as plain operations, for machines with neither.

    Returns:
      `[R, N]` in the dtype of `rows`; blocks that are not in use may hold anything.
    """
    *stack, experts, halves, depth, columns = weights.shape
    layer = jnp.zeros((), jnp.int32)
    for size, index in zip(stack, layer_index, strict=True):
        layer = layer * size + index
    block = len(rows) // len(owner)
    operands: list[jax.Array] = [rows, weights.reshape(math.prod(stack) * experts, halves, depth, columns)]
    if scale is not None:
        operands.append(scale.reshape(-1, halves, 1, columns))
    estimate = pl.CostEstimate(
        flops=2 * expected * depth * columns * halves,
        bytes_accessed=min(experts, expected // block) * halves * depth * columns * weights.dtype.itemsize,
        transcendentals=expected * columns * (halves - 1),
    )
    call = {"tpu": _on_tpu, "cuda": _on_gpu}[platform]
    return call(layer * experts + owner, used, operands, cost_estimate=estimate, interpret=interpret)


def _on_tpu(expert: jax.Array, used: jax.Array, operands: list[jax.Array], **options: Any) -> jax.Array:
    """Calls the kernel for TPUs.

    Args:
      expert: `[G]` int32, the expert of each block, numbered over all layers.
      used: int32, the number of blocks in use.
      operands: rows `[R, K]`, weights `[X, H, K, N]`, and for int8 weights their scales `[X, H, 1, N]`.
      options: of `pl.pallas_call`.
    """
    rows, weights, *scale = operands
    _, halves, depth, columns = weights.shape
    block = len(rows) // len(expert)
    tile = _tile(columns, halves * depth * weights.dtype.itemsize)
    # A block that is not in use has the index of the last block in use, so nothing is fetched for it.
    place = jnp.minimum(jnp.arange(len(expert)), jnp.maximum(used - 1, 0)).astype(jnp.int32)

    def of_expert(n: jax.Array, g: jax.Array, place: Ref, expert: Ref, used: Ref) -> tuple[Any, ...]:
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
        **options,
    )(place, expert[place].astype(jnp.int32), used.reshape(1).astype(jnp.int32), *operands)


def _tile(columns: int, column_bytes: int) -> int:
    """Returns the widest tile that divides `columns` and has at most `MAX_TILE_BYTES`; at least `TPU_LANES` columns."""
    lanes = columns // TPU_LANES
    fitting = (n for n in range(lanes, 0, -1) if lanes % n == 0 and n * TPU_LANES * column_bytes <= MAX_TILE_BYTES)
    return next(fitting, 1) * TPU_LANES


def _tpu_kernel(halves: int, place: Ref, expert: Ref, used: Ref, rows: Ref, weights: Ref, *rest: Ref) -> None:
    """Multiplies one block of rows with one tile of columns; `rest` is the scale, if any, and the output."""
    del place, expert
    *scale, out = rest

    @pl.when(pl.program_id(1) < used[0])
    def _():
        def product(half: int) -> jax.Array:
            tile = weights[0, half].astype(rows.dtype)
            result = jax.lax.dot(rows[...], tile, preferred_element_type=jnp.float32)
            return result * scale[0][0, half] if scale else result

        result = product(0)
        if halves == 2:
            result = jax.nn.silu(result) * product(1)
        out[...] = result.astype(out.dtype)


def _on_gpu(expert: jax.Array, used: jax.Array, operands: list[jax.Array], **options: Any) -> jax.Array:
    """Calls the kernel for GPUs; the arguments are those of `_on_tpu`.

    Blocks of one expert are neighbours in the grid, so the second block finds the weights in the cache.
    """
    rows, weights, *_ = operands
    blocks, columns = len(expert), weights.shape[-1]
    block = len(rows) // blocks
    if block < GPU_ROWS:
        padded = jnp.pad(rows.reshape(blocks, block, -1), ((0, 0), (0, GPU_ROWS - block), (0, 0)))
        result = _on_gpu(expert, used, [padded.reshape(blocks * GPU_ROWS, -1), *operands[1:]], **options)
        return result.reshape(blocks, GPU_ROWS, columns)[:, :block].reshape(-1, columns)
    return pl.pallas_call(
        partial(_gpu_kernel, block),
        grid=(columns // GPU_TILE, blocks),
        out_shape=jax.ShapeDtypeStruct((len(rows), columns), rows.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4 if block < TPU_LANES else 8, num_stages=3),
        **options,
    )(expert.astype(jnp.int32), used.reshape(1).astype(jnp.int32), *operands)


def _gpu_kernel(block: int, expert: Ref, used: Ref, rows: Ref, weights: Ref, *rest: Ref) -> None:
    """Multiplies one block of rows with one tile of columns; `rest` is the scale, if any, and the output."""
    *scale, out = rest
    _, halves, depth, _ = weights.shape
    n, g = pl.program_id(0), pl.program_id(1)

    @pl.when(g < used[0])
    def _():
        block_rows, columns = pl.ds(g * block, block), pl.ds(n * GPU_TILE, GPU_TILE)

        def add_part(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            depths = pl.ds(k * GPU_TILE, GPU_TILE)
            row_part = rows[block_rows, depths]

            def product(half: int) -> jax.Array:
                tile = weights[expert[g], half, depths, columns].astype(row_part.dtype)
                return jax.lax.dot(row_part, tile, preferred_element_type=jnp.float32)

            return tuple(total + product(half) for half, total in enumerate(sums))

        zeros = (jnp.zeros((block, GPU_TILE), jnp.float32),) * halves
        sums = jax.lax.fori_loop(0, depth // GPU_TILE, add_part, zeros)
        if scale:
            sums = tuple(total * scale[0][expert[g], half, 0, columns] for half, total in enumerate(sums))
        result = sums[0] if halves == 1 else jax.nn.silu(sums[0]) * sums[1]
        out[block_rows, columns] = result.astype(out.dtype)
