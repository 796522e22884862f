"""Grouped matrix products for serving on a TPU: experts are read where they stand in the stack of layers, int8 too.

Axes: R rows, G blocks of B rows, X experts of all layers of the stack, H halves (gate and up, or one), K width that is
summed over, N columns. Every block of rows belongs to one expert. A library's kernel takes the weights of one layer:
to cut those out of the stack is to copy them, 1.6 GB a layer and device for the model that this is written for. Only
experts that have rows are read, each once per pass over its columns. Called by `grouped`; no gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtml.model.grouped import LANES

TILE_BYTES = 2**22  # of weights on their way into fast memory, twice, at most


def multiply(
    rows: jax.Array,
    owner: jax.Array,
    used: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    at: tuple[jax.Array, ...],
    expected: int,
    interpret: bool = False,
) -> jax.Array:
    """`rows @ weights` of the block's owner; with two halves `silu(rows @ gate) * (rows @ up)`.

    Args:
      rows: `[R, K]`, K a multiple of 128.
      owner: `[G]` int32, the expert of each block, not falling.
      used: int32, blocks in use.
      weights: `[*stack, E, H, K, N]`, N a multiple of 128, in the dtype of `rows` or int8.
      scale: `[*stack, E, H, N]` float32, what int8 columns are multiplied by; None: nothing.
      at: which layer of the stack.
      expected: rows in use where the load is even, for the compiler's and the plan's estimates.
      interpret: run it as plain operations, where there is no TPU.

    Returns:
      `[R, N]` in the dtype of `rows`; anything in blocks behind those in use.
    """
    *stack, experts, halves, depth, columns = weights.shape
    layer = jnp.zeros((), jnp.int32)
    for size, index in zip(stack, at, strict=True):
        layer = layer * size + index
    block = len(rows) // len(owner)
    tile = _tile(columns, halves * depth * weights.dtype.itemsize)
    weights = weights.reshape(math.prod(stack) * experts, halves, depth, columns)
    # A block behind those in use asks for what the last one had: nothing is fetched for it.
    place = jnp.minimum(jnp.arange(len(owner)), jnp.maximum(used - 1, 0)).astype(jnp.int32)
    expert = (layer * experts + owner[place]).astype(jnp.int32)

    def of_expert(n: Any, g: Any, place: Any, expert: Any, used: Any) -> tuple[Any, ...]:
        return expert[g], 0, 0, n

    given: list[Any] = [rows, weights]
    specs = [
        pl.BlockSpec((block, depth), lambda n, g, place, expert, used: (place[g], 0)),
        pl.BlockSpec((1, halves, depth, tile), of_expert),
    ]
    if scale is not None:
        given.append(scale.reshape(-1, halves, 1, columns))
        specs.append(pl.BlockSpec((1, halves, 1, tile), of_expert))
    return pl.pallas_call(
        partial(_kernel, halves),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns // tile, len(owner)),
            in_specs=specs,
            out_specs=pl.BlockSpec((block, tile), lambda n, g, place, expert, used: (place[g], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(rows), columns), rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected * depth * columns * halves,
            bytes_accessed=min(experts, expected // block) * halves * depth * columns * weights.dtype.itemsize,
            transcendentals=expected * columns * (halves - 1),
        ),
        interpret=interpret,
    )(place, expert, used.reshape(1).astype(jnp.int32), *given)


def _tile(columns: int, column_bytes: int) -> int:
    """The widest tile of columns that divides them and keeps within `TILE_BYTES`, at least one register wide."""
    lanes = columns // LANES
    fitting = (n for n in range(lanes, 0, -1) if lanes % n == 0 and n * LANES * column_bytes <= TILE_BYTES)
    return next(fitting, 1) * LANES


def _kernel(halves: int, place: Any, expert: Any, used: Any, rows: Any, weights: Any, *rest: Any) -> None:
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
