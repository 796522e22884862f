"""Attention with Inkling's relative bias as TPU kernels: no array of the size `[T, T]` or `[T, extent]` in memory.

Axes: B batch, G key/value heads, H = G Q query heads, T tokens, K head width, R width of the relative state, E relative
extent, C tokens of a block (of queries and of keys alike), N distances between blocks, W = 2 C columns of a band.
Called by `sequence`.

The bias of query i for key j is `(r_i @ proj)[i - j]`, and zero beyond the extent. Between a block of queries and a
block of keys that stand n blocks apart there are 2 C - 1 distances: a band. `bands[n]` `[R, W]` holds the columns of
`proj` for that band, the farthest distance first. `r @ bands[n]` `[C, W]` then holds each query's biases over the band,
and the bias of query a for key b is in column `b + C - 1 - a`. So row a must be rotated to the left by C - 1 - a
columns: one column less than the row above. One strided rotation does this for all rows. The bands are cut from `proj`
outside the kernels, and their gradient is scattered back there. Blocks that lie outside the window or after the query
are skipped. Beyond the extent a band is zero and is not read.

This is flash attention (Dao et al., 2022; 2023); `online_softmax` has its arithmetic. The second part of "Inside the
kernels" is for `flash_far` too, which has the kernels for tokens beyond the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtml.model.attention.online_softmax import SoftmaxSums, add_keys, finish_softmax, probabilities
from jaxtml.model.numerics import MASKED_LOGIT
from jaxtml.parallel.chips import TPU_LANES

Ref = Any  # a reference to a block of an array in the memory of a kernel; the class `jax.Ref` is not typed as one


class FlashPlan(NamedTuple):
    """The sizes of one call, all static.

    Attributes:
      tokens: T, padded to a multiple of `block`.
      block: C.
      window: distances `[0, window)` are seen.
      extent: E.
      interpret: run the kernels as plain operations.
    """

    tokens: int
    block: int
    window: int
    extent: int
    interpret: bool

    @property
    def blocks(self) -> int:
        """The number of blocks of a sequence."""
        return self.tokens // self.block

    @property
    def back(self) -> int:
        """How many blocks before its own a query can see."""
        return min(-(-(self.window - 1) // self.block), self.blocks - 1)

    @property
    def bias_distances(self) -> int:
        """N, the number of bands: there is a bias for keys fewer than N blocks before the block of queries."""
        return min((self.extent + self.block - 2) // self.block, self.back) + 1


def flash_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rel: jax.Array,
    proj: jax.Array,
    scale: jax.Array,
    segments: jax.Array,
    *,
    window: int,
    block: int = 512,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes causal attention of whole sequences.

    Args:
      query: `[B, H, T, K]`.
      keys, values: `[B, G, T, K]`.
      rel: `[B, H, T, R]`, the relative state.
      proj: `[R, E]`.
      scale: `[T]` float32, the factor of each query's logits (log-length scaling).
      segments: `[B, T]` int32; a token sees only tokens of its own segment.
      window: distances `[0, window)` are seen.
      block: C, a multiple of 128.
      interpret: run the kernels as plain operations, for machines without a TPU.

    Returns:
      `[B, H, T, K]` in the dtype of `query`, and the logarithm of each query's softmax sum, `[B, H, T]` float32.
    """
    tokens = query.shape[2]
    block = min(block, -(-tokens // TPU_LANES) * TPU_LANES)
    padding = -tokens % block

    def pad(a: jax.Array, axis: int, value: int = 0) -> jax.Array:
        widths = [(0, padding if i == axis else 0) for i in range(a.ndim)]
        return jnp.pad(a, widths, constant_values=value) if padding else a

    plan = FlashPlan(tokens + padding, block, window, proj.shape[1], interpret)
    query, keys, values, rel = (pad(a, 2) for a in (query, keys, values, rel))
    segments = pad(segments, 1, -1)
    scale = pad(scale, 0, 1)
    attended: Any = _flash(plan, query, keys, values, rel, _bands(plan, proj), scale, segments)
    return attended[0][:, :, :tokens], attended[1][:, :, :tokens]


def _bands(plan: FlashPlan, proj: jax.Array) -> jax.Array:
    """Returns `[N, R, W]`: column m of band n is the column of `proj` for the distance n C + C - 1 - m, or zero."""
    c = plan.block
    distance = jnp.arange(plan.bias_distances)[:, None] * c + c - 1 - jnp.arange(2 * c)
    inside = (distance >= 0) & (distance < plan.extent)
    return jnp.where(inside, proj[:, jnp.clip(distance, 0, plan.extent - 1)], 0).transpose(1, 0, 2)


def repeat_over_lanes(vector: jax.Array) -> jax.Array:
    """`[..., T]` -> `[..., T, TPU_LANES]`: repeats each value over the width of a register."""
    return jnp.broadcast_to(vector[..., None], (*vector.shape, TPU_LANES))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(plan: FlashPlan, query, keys, values, rel, bands, scale, segments):
    """`flash_attention` of padded arrays, with a custom adjoint."""
    out, lse = _forward(plan, query, keys, values, rel, bands, scale, segments)
    return out, lse[..., 0]


def _flash_fwd(plan, query, keys, values, rel, bands, scale, segments):
    out, lse = _forward(plan, query, keys, values, rel, bands, scale, segments)
    return (out, lse[..., 0]), (query, keys, values, rel, bands, scale, segments, out, lse)


def _flash_bwd(plan, residuals, grads):
    query, keys, values, rel, bands, scale, segments, out, lse = residuals
    grad, grad_lse = grads
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - grad_lse
    operands = (query, keys, values, rel, bands, scale, segments, grad, lse, repeat_over_lanes(mean))
    dquery, drel, dbands = _backward_queries(plan, *operands)
    dkeys, dvalues = _backward_keys(plan, *operands)
    groups = keys.shape[1]

    def sum_heads(d: jax.Array) -> jax.Array:  # [B, H, T, K] -> [B, G, T, K]
        return d.reshape(d.shape[0], groups, -1, *d.shape[2:]).sum(axis=2)

    return (
        dquery.astype(query.dtype),
        sum_heads(dkeys).astype(keys.dtype),
        sum_heads(dvalues).astype(values.dtype),
        drel.astype(rel.dtype),
        dbands.sum(axis=(0, 1)).astype(bands.dtype),
        None,
        None,
    )


_flash.defvjp(_flash_fwd, _flash_bwd)


# --- Inside the kernels.


class _OperandRefs(NamedTuple):
    """References to the blocks of the operands for one grid step, in the order of `_operands`.

    Attributes:
      query, keys, values: `[1, 1, C, K]`.
      rel: `[1, 1, C, R]`.
      band: `[1, R, W]`.
      scale: `[C, TPU_LANES]`, the same in all columns.
      query_segment: `[1, C, TPU_LANES]`, the same in all columns.
      key_segment: `[1, 8, C]`, the same in all rows.
    """

    query: Ref
    keys: Ref
    values: Ref
    rel: Ref
    band: Ref
    scale: Ref
    query_segment: Ref
    key_segment: Ref


def _logits(plan: FlashPlan, n: jax.Array, refs: _OperandRefs) -> jax.Array:
    """Returns the masked logits `[C, C]` float32 of a block of queries for the block of keys n blocks before it."""
    query, key, rel, band = refs.query[0, 0], refs.keys[0, 0], refs.rel[0, 0], refs.band[0]
    scale, query_segment, key_segment = refs.scale[:, :1], refs.query_segment[0, :, :1], refs.key_segment[0, :1]
    c = plan.block
    logits = dot(query, key, 1, 1)
    bias = jnp.where(n < plan.bias_distances, dot(rel, band, 1, 0), 0.0)
    logits += rotate_rows(bias, c + 1, 1, plan.interpret)[:, :c]  # row a to the left by C - 1 - a
    logits *= scale
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (c, c), i) for i in (0, 1))
    distance = n * c + rows - columns
    return jnp.where((distance >= 0) & (distance < plan.window) & (query_segment == key_segment), logits, MASKED_LOGIT)


def rotate_rows(x: jax.Array, shift: int, stride: int, interpret: bool) -> jax.Array:
    """Rotates row a of `x` `[C, W]` to the right by `shift + stride * a`: one strided rotation on a TPU.

    With `interpret`, a strided rotation would become C slices, so a gather takes its place.
    """
    if not interpret:
        return pltpu.roll(x, shift, 1, stride=stride, stride_axis=0)
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, x.shape, i) for i in (0, 1))
    return jnp.take_along_axis(x, (columns - shift - stride * rows) % x.shape[1], axis=1)


def rotate_rows_back(x: jax.Array, c: int) -> jax.Array:
    """Rotates row a of `x` `[C, W]` to the right by `C - 1 - a`.

    The strided rotation of a TPU takes no negative stride. So the rows are rotated once for each bit of `C - 1 - a`.
    """
    shift = c - 1 - jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range((c - 1).bit_length()):
        x = jnp.where((shift >> bit) & 1 == 1, pltpu.roll(x, 1 << bit, 1), x)
    return x


def _forward_kernel(plan: FlashPlan, *all_refs: Ref) -> None:
    """Adds one block of keys to the softmax of a block of queries."""
    refs = _OperandRefs(*all_refs[:8])
    out, lse, *scratch = all_refs[8:]
    sums = SumRefs(*scratch)
    step = pl.program_id(3)
    n = plan.back - step
    pl.when(step == 0)(sums.begin)

    @pl.when(pl.program_id(2) >= n)
    def _():
        sums.add_keys(_logits(plan, n, refs), refs.values)

    @pl.when(step == plan.back)
    def _():
        sums.finish(out, lse)


def _queries_kernel(plan: FlashPlan, *all_refs: Ref) -> None:
    """Adds one block of keys to the gradients of a block of queries: to `dquery`, `drel` and `dbands`.

    `sum_query` and `sum_rel` are scratch memory.
    """
    refs = _OperandRefs(*all_refs[:8])
    grad, lse, mean, dquery, drel, dbands, sum_query, sum_rel = all_refs[8:]
    step = pl.program_id(3)
    n = plan.back - step

    @pl.when((pl.program_id(2) == 0) & (step == 0))
    def _():
        dbands[...] = jnp.zeros_like(dbands)

    @pl.when(step == 0)
    def _():
        sum_query[...] = jnp.zeros_like(sum_query)
        sum_rel[...] = jnp.zeros_like(sum_rel)

    @pl.when(pl.program_id(2) >= n)
    def _():
        dlogits = differentiate_logits(_logits(plan, n, refs), refs.values, refs.scale, grad, lse, mean)[1]
        sum_query[...] += dot(dlogits.astype(refs.keys.dtype), refs.keys[0, 0], 1, 0)

        @pl.when(n < plan.bias_distances)
        def _():
            c = plan.block
            wide = jnp.concatenate([dlogits, jnp.zeros_like(dlogits)], axis=1)
            dbias = rotate_rows_back(wide, c).astype(refs.band.dtype)
            sum_rel[...] += dot(dbias, refs.band[0], 1, 1)
            dbands[0, 0, n] += dot(refs.rel[0, 0], dbias, 0, 0)

    @pl.when(step == plan.back)
    def _():
        dquery[0, 0] = sum_query[...]
        drel[0, 0] = sum_rel[...]


def _keys_kernel(plan: FlashPlan, *all_refs: Ref) -> None:
    """Adds one block of queries to the gradients of a block of keys: to `dkeys` and `dvalues`.

    `sum_keys` and `sum_values` are scratch memory.
    """
    refs = _OperandRefs(*all_refs[:8])
    grad, lse, mean, dkeys, dvalues, sum_keys, sum_values = all_refs[8:]
    n = pl.program_id(3)

    @pl.when(n == 0)
    def _():
        sum_keys[...] = jnp.zeros_like(sum_keys)
        sum_values[...] = jnp.zeros_like(sum_values)

    @pl.when(pl.program_id(2) + n < plan.blocks)
    def _():
        weights, dlogits = differentiate_logits(_logits(plan, n, refs), refs.values, refs.scale, grad, lse, mean)
        sum_values[...] += dot(weights.astype(grad.dtype), grad[0, 0], 0, 0)
        sum_keys[...] += dot(dlogits.astype(refs.query.dtype), refs.query[0, 0], 0, 0)

    @pl.when(n == plan.back)
    def _():
        dkeys[0, 0] = sum_keys[...]
        dvalues[0, 0] = sum_values[...]


# --- Inside the kernels: what `flash_far` shares.


class SumRefs(NamedTuple):
    """Scratch memory with the `SoftmaxSums` of a block of queries, float32.

    Attributes:
      largest, total: `[C, TPU_LANES]`, the same in all columns.
      weighted: `[C, K]`.
    """

    largest: Ref
    total: Ref
    weighted: Ref

    @staticmethod
    def shapes(block: int, width: int) -> list[tuple[int, int]]:
        """Returns the shapes, for blocks of `block` queries with heads of `width`."""
        return [(block, TPU_LANES), (block, TPU_LANES), (block, width)]

    def begin(self) -> None:
        """Writes the sums over no key."""
        for ref, value in zip(self, (MASKED_LOGIT, 0.0, 0.0), strict=True):
            ref[...] = jnp.full_like(ref, value)

    def add_keys(self, logits: jax.Array, values: Ref) -> None:
        """Adds a block of keys with logits `[C, C]` float32 and values `[1, 1, C, K]`."""
        new = add_keys(self._read(), logits, values[0, 0], partial(dot, i=1, j=0))
        for ref, value in zip(self, new, strict=True):
            ref[...] = jnp.broadcast_to(value, ref.shape)

    def finish(self, out: Ref, lse: Ref) -> None:
        """Writes attention `[1, 1, C, K]` and the logarithm of the softmax sum `[1, 1, C, TPU_LANES]`."""
        attention, log_sum = finish_softmax(self._read())
        out[0, 0] = attention.astype(out.dtype)
        lse[0, 0] = jnp.broadcast_to(log_sum, self.largest.shape)

    def _read(self) -> SoftmaxSums:
        return SoftmaxSums(self.largest[:, :1], self.total[:, :1], self.weighted[...])


def differentiate_logits(
    logits: jax.Array, values: Ref, scale: Ref, grad: Ref, lse: Ref, mean: Ref
) -> tuple[jax.Array, jax.Array]:
    """Returns the probabilities and the gradient of the unscaled logits, `[C, C]` float32 each.

    Args:
      logits: `[C, C]` float32, scaled and masked.
      values: `[1, 1, C, K]`.
      scale: `[C, TPU_LANES]`, the factor of each query's logits.
      grad: `[1, 1, C, K]`, the gradient of the result.
      lse, mean: `[1, 1, C, TPU_LANES]`, the logarithm of the softmax sum, and the mean gradient of a probability.
    """
    weights = probabilities(logits, lse[0, 0][:, :1])
    dweights = dot(grad[0, 0], values[0, 0], 1, 1)
    return weights, weights * (dweights - mean[0, 0][:, :1]) * scale[:, :1]


def dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Returns the matrix product that sums over axis i of `a` and axis j of `b`, in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


# --- The calls of the kernels.


def _operand_specs(plan: FlashPlan, query, keys, rel, bands, by_keys: bool) -> list[pl.BlockSpec]:
    """Returns the block specs of the arrays of `_operands` for one grid step.

    The grid is `(B, H, block, distance)`. The block is a block of queries, or with `by_keys` a block of keys. A step
    that is skipped has the index of a neighbour, so nothing is fetched for it.
    """
    c, per_group = plan.block, query.shape[1] // keys.shape[1]

    def indices(i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the block of queries, the block of keys and the distance between them."""
        if by_keys:
            return jnp.minimum(i + j, plan.blocks - 1), i, j
        n = plan.back - j
        return i, jnp.maximum(i - n, 0), n

    def of_queries(b, h, i, j):
        return b, h, indices(i, j)[0], 0

    def of_keys(b, h, i, j):
        return b, h // per_group, indices(i, j)[1], 0

    return [
        pl.BlockSpec((1, 1, c, query.shape[3]), of_queries),
        pl.BlockSpec((1, 1, c, keys.shape[3]), of_keys),
        pl.BlockSpec((1, 1, c, keys.shape[3]), of_keys),
        pl.BlockSpec((1, 1, c, rel.shape[3]), of_queries),
        pl.BlockSpec(
            (1, *bands.shape[1:]), lambda b, h, i, j: (jnp.minimum(indices(i, j)[2], plan.bias_distances - 1), 0, 0)
        ),
        pl.BlockSpec((c, TPU_LANES), lambda b, h, i, j: (indices(i, j)[0], 0)),
        pl.BlockSpec((1, c, TPU_LANES), lambda b, h, i, j: (b, indices(i, j)[0], 0)),
        pl.BlockSpec((1, 8, c), lambda b, h, i, j: (b, 0, indices(i, j)[1])),
    ]  # fmt: skip


def _call(
    plan: FlashPlan,
    kernel: Callable[..., None],
    query: jax.Array,
    inputs: Sequence[pl.BlockSpec],
    outputs: Sequence[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
    scratch: Sequence[tuple[int, ...]],
    arrays: Sequence[jax.Array],
    flops: int,
):
    """Calls a kernel; `flops` are those of one pair of a query and a key, for the cost estimate."""
    batch, heads = query.shape[:2]
    grid = (batch, heads, plan.blocks, plan.back + 1)
    specs, shapes = zip(*outputs, strict=True)
    pairs = batch * heads * sum(min(i, plan.back) + 1 for i in range(plan.blocks))
    return pl.pallas_call(
        partial(kernel, plan),
        grid=grid,
        in_specs=inputs,
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=pairs * plan.block**2 * flops,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
            transcendentals=pairs * plan.block**2,
        ),
        interpret=plan.interpret,
    )(*arrays)


def _row_blocks(plan: FlashPlan, width: int) -> pl.BlockSpec:
    """Returns the block spec of an array `[B, H, T, width]` that is indexed by the grid's block."""
    return pl.BlockSpec((1, 1, plan.block, width), lambda b, h, i, j: (b, h, i, 0))


def _operands(plan: FlashPlan, query, keys, values, rel, bands, scale, segments) -> tuple[jax.Array, ...]:
    """Returns query, keys, values, rel, bands, scale, and the segments twice: as rows and as columns."""
    columns = jnp.broadcast_to(segments[:, None], (segments.shape[0], 8, plan.tokens))
    return query, keys, values, rel, bands, repeat_over_lanes(scale), repeat_over_lanes(segments), columns


def _forward(plan: FlashPlan, query, keys, values, rel, bands, scale, segments):
    """Returns attention `[B, H, T, K]`, and the logarithm of each softmax sum, `[B, H, T, TPU_LANES]` float32."""
    c, width = plan.block, query.shape[3]
    rows = query.shape[:3]
    out, lse = _call(
        plan,
        _forward_kernel,
        query,
        _operand_specs(plan, query, keys, rel, bands, by_keys=False),
        [
            (_row_blocks(plan, width), jax.ShapeDtypeStruct(query.shape, query.dtype)),
            (_row_blocks(plan, TPU_LANES), jax.ShapeDtypeStruct((*rows, TPU_LANES), jnp.float32)),
        ],
        SumRefs.shapes(c, width),
        _operands(plan, query, keys, values, rel, bands, scale, segments),
        4 * width + 4 * rel.shape[3],
    )
    return out, lse


def _backward_queries(plan: FlashPlan, query, keys, values, rel, bands, scale, segments, grad, lse, mean):
    """Returns the gradients of query and rel, float32, and of the bands, `[B, H, N, R, W]` float32."""
    c, width, rank = plan.block, query.shape[3], rel.shape[3]
    batch, heads = query.shape[:2]
    shape = (batch, heads, *bands.shape)
    all_bands = pl.BlockSpec((1, 1, *bands.shape), lambda b, h, i, j: (b, h, 0, 0, 0))
    return _call(
        plan,
        _queries_kernel,
        query,
        [*_operand_specs(plan, query, keys, rel, bands, by_keys=False), *_residual_specs(plan, width, by_keys=False)],
        [
            (_row_blocks(plan, width), jax.ShapeDtypeStruct(query.shape, jnp.float32)),
            (_row_blocks(plan, rank), jax.ShapeDtypeStruct(rel.shape, jnp.float32)),
            (all_bands, jax.ShapeDtypeStruct(shape, jnp.float32)),
        ],
        [(c, width), (c, rank)],
        (*_operands(plan, query, keys, values, rel, bands, scale, segments), grad, lse, mean),
        6 * width + 12 * rank,
    )


def _backward_keys(plan: FlashPlan, query, keys, values, rel, bands, scale, segments, grad, lse, mean):
    """Returns the gradients of keys and values for each query head, `[B, H, T, K]` float32."""
    c, width = plan.block, query.shape[3]
    return _call(
        plan,
        _keys_kernel,
        query,
        [*_operand_specs(plan, query, keys, rel, bands, by_keys=True), *_residual_specs(plan, width, by_keys=True)],
        [(_row_blocks(plan, width), jax.ShapeDtypeStruct(query.shape, jnp.float32))] * 2,
        [(c, width), (c, width)],
        (*_operands(plan, query, keys, values, rel, bands, scale, segments), grad, lse, mean),
        8 * width + 4 * rel.shape[3],
    )


def _residual_specs(plan: FlashPlan, width: int, by_keys: bool) -> list[pl.BlockSpec]:
    """Returns the block specs of what the backward pass reads by query: gradient, logarithm of the sum, and mean."""

    def index(b, h, i, j):
        return b, h, jnp.minimum(i + j, plan.blocks - 1) if by_keys else i, 0

    return [pl.BlockSpec((1, 1, plan.block, n), index) for n in (width, TPU_LANES, TPU_LANES)]
