"""Attention with the family's relative bias as TPU kernels: nothing of the size `[T, T]` or `[T, extent]` in memory.

Axes: B batch, G key/value heads, H = G Q query heads, T tokens, K head width, R width of the relative state, E relative
extent, C tokens of a block (queries and keys alike), N distances between blocks, W = 2 C columns of a band.

The bias of query i for key j is `(r_i @ proj)[i - j]`, zero beyond the extent. For a block of queries and one of keys
that stand n blocks apart, the distances form a band of 2 C - 1 values. `bands[n]` `[R, W]` holds the band's columns of
`proj`, the farthest distance first, so that `r @ bands[n]` `[C, W]` is every query's profile over the band, and the
bias of query a for key b is its column `b + C - 1 - a`: each row turned one further to the left than the row above,
which is one strided rotation. Bands are cut from `proj` outside the kernels, and their gradient is scattered back
there. Blocks outside the window or after the query are skipped; beyond the extent the band is zero and is not read.

Flash attention (Dao et al., 2022; 2023): softmax over one block of keys after the other, the logarithm of its sum kept
for the backward pass, in which probabilities are computed again. Called by `attend`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtml.model.numerics import MASKED_LOGIT
from jaxtml.parallel.chips import TPU_LANES


class Plan(NamedTuple):
    """Sizes of one call, all static."""

    tokens: int  # a multiple of `block`
    block: int
    window: int
    extent: int
    interpret: bool

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def back(self) -> int:
        """How many blocks before its own a query can see into."""
        return min(-(-(self.window - 1) // self.block), self.blocks - 1)

    @property
    def biased(self) -> int:
        """Distances between blocks at which there is a bias: `bands[:biased]`."""
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
) -> jax.Array:
    """Causal attention of whole sequences.

    Args:
      query: `[B, H, T, K]`.
      keys: `[B, G, T, K]`; `values` likewise.
      rel: `[B, H, T, R]`.
      proj: `[R, E]`.
      scale: `[T]` float32, factor of each query's logits (log-length scaling).
      segments: `[B, T]` int32; tokens see those of their own segment.
      window: distances `[0, window)` are seen.
      block: C, a multiple of 128.
      interpret: run the kernels as plain operations, where there is no TPU.

    Returns:
      `[B, H, T, K]` in the dtype of `query`.
    """
    tokens = query.shape[2]
    block = min(block, -(-tokens // TPU_LANES) * TPU_LANES)
    padding = -tokens % block

    def padded(a: jax.Array, axis: int, value: int = 0) -> jax.Array:
        widths = [(0, padding if i == axis else 0) for i in range(a.ndim)]
        return jnp.pad(a, widths, constant_values=value) if padding else a

    plan = Plan(tokens + padding, block, window, proj.shape[1], interpret)
    query, keys, values, rel = (padded(a, 2) for a in (query, keys, values, rel))
    segments = padded(segments, 1, -1)
    scale = padded(scale, 0, 1)
    out: Any = _flash(plan, query, keys, values, rel, _bands(plan, proj), scale, segments)
    return out[:, :, :tokens]


def _bands(plan: Plan, proj: jax.Array) -> jax.Array:
    """`[biased, R, W]`: column m of band n is `proj` at the distance n C + C - 1 - m, zero where there is none."""
    c = plan.block
    distance = jnp.arange(plan.biased)[:, None] * c + c - 1 - jnp.arange(2 * c)
    inside = (distance >= 0) & (distance < plan.extent)
    return jnp.where(inside, proj[:, jnp.clip(distance, 0, plan.extent - 1)], 0).transpose(1, 0, 2)


def _lanes(vector: jax.Array) -> jax.Array:
    """`[..., T]` -> `[..., T, LANES]`: a value per row, as registers hold it."""
    return jnp.broadcast_to(vector[..., None], (*vector.shape, TPU_LANES))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(plan: Plan, query, keys, values, rel, bands, scale, segments):
    return _forward(plan, query, keys, values, rel, bands, scale, segments)[0]


def _flash_fwd(plan, query, keys, values, rel, bands, scale, segments):
    out, lse = _forward(plan, query, keys, values, rel, bands, scale, segments)
    return out, (query, keys, values, rel, bands, scale, segments, out, lse)


def _flash_bwd(plan, saved, grad):
    query, keys, values, rel, bands, scale, segments, out, lse = saved
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    given = (query, keys, values, rel, bands, scale, segments, grad, lse, _lanes(mean))
    dquery, drel, dbands = _backward_queries(plan, *given)
    dkeys, dvalues = _backward_keys(plan, *given)
    groups = keys.shape[1]

    def shared(d: jax.Array) -> jax.Array:  # [B, H, T, K] -> [B, G, T, K]
        return d.reshape(d.shape[0], groups, -1, *d.shape[2:]).sum(axis=2)

    return (
        dquery.astype(query.dtype),
        shared(dkeys).astype(keys.dtype),
        shared(dvalues).astype(values.dtype),
        drel.astype(rel.dtype),
        dbands.sum(axis=(0, 1)).astype(bands.dtype),
        None,
        None,
    )


_flash.defvjp(_flash_fwd, _flash_bwd)


# --- inside the kernels


def _logits(plan: Plan, n: Any, query: Any, key: Any, rel: Any, band: Any, scale: Any, own: Any, theirs: Any) -> Any:
    """Masked logits `[C, C]` float32 of a block of queries for the block of keys n blocks before it.

    `band` `[R, W]`; `scale` `[C, 1]`; `own` `[C, 1]` and `theirs` `[1, C]` are segments.
    """
    c = plan.block
    logits = _dot(query, key, 1, 1)
    profile = jnp.where(n < plan.biased, _dot(rel, band, 1, 0), 0.0)
    logits += turned(profile, c + 1, 1, plan.interpret)[:, :c]  # row a to the left by C - 1 - a
    logits *= scale
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (c, c), i) for i in (0, 1))
    distance = n * c + rows - columns
    return jnp.where((distance >= 0) & (distance < plan.window) & (own == theirs), logits, MASKED_LOGIT)


def turned(x: jax.Array, first: int, more: int, interpret: bool) -> jax.Array:
    """`x` `[C, W]` with row a turned to the right by `first + more * a`, one strided rotation on a TPU.

    Interpreted, a rotation with a stride is C slices; a gather is one operation.
    """
    if not interpret:
        return pltpu.roll(x, first, 1, stride=more, stride_axis=0)
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, x.shape, i) for i in (0, 1))
    return jnp.take_along_axis(x, (columns - first - more * rows) % x.shape[1], axis=1)


def turned_back(x: jax.Array, c: int) -> jax.Array:
    """`x` `[C, W]` with row a turned to the right by `C - 1 - a`: bit by bit, for no rotation has a stride below 0."""
    left = c - 1 - jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range((c - 1).bit_length()):
        x = jnp.where((left >> bit) & 1 == 1, pltpu.roll(x, 1 << bit, 1), x)
    return x


def _dot(a: Any, b: Any, i: int, j: int) -> Any:
    """Sums over axis i of `a` and axis j of `b` in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(plan: Plan, q, k, v, r, band, scale, own, theirs, out, lse, best, total, sum_):
    step = pl.program_id(3)
    n = plan.back - step

    @pl.when(step == 0)
    def _():
        best[...] = jnp.full_like(best, MASKED_LOGIT)
        total[...] = jnp.zeros_like(total)
        sum_[...] = jnp.zeros_like(sum_)

    @pl.when(pl.program_id(2) >= n)
    def _():
        logits = _logits(plan, n, q[0, 0], k[0, 0], r[0, 0], band[0], scale[:, :1], own[0, :, :1], theirs[0, :1])
        now = jnp.maximum(best[:, :1], logits.max(axis=1, keepdims=True))
        weights = jnp.where(logits > MASKED_LOGIT / 2, jnp.exp(logits - now), 0.0)
        shrink = jnp.exp(best[:, :1] - now)
        total[...] = total[...] * shrink + weights.sum(axis=1, keepdims=True)
        sum_[...] = sum_[...] * shrink + _dot(weights.astype(v.dtype), v[0, 0], 1, 0)
        best[...] = jnp.broadcast_to(now, best.shape)

    @pl.when(step == plan.back)
    def _():
        out[0, 0] = (sum_[...] / total[:, :1]).astype(out.dtype)
        lse[0, 0] = best[...] + jnp.log(total[...])


def _dlogits(plan: Plan, n: Any, q, k, v, r, band, scale, own, theirs, grad, lse, mean) -> tuple[Any, Any]:
    """Probabilities and the gradient of the unscaled logits, `[C, C]` float32 each."""
    logits = _logits(plan, n, q[0, 0], k[0, 0], r[0, 0], band[0], scale[:, :1], own[0, :, :1], theirs[0, :1])
    weights = jnp.where(logits > MASKED_LOGIT / 2, jnp.exp(logits - lse[0, 0][:, :1]), 0.0)
    dweights = _dot(grad[0, 0], v[0, 0], 1, 1)
    return weights, weights * (dweights - mean[0, 0][:, :1]) * scale[:, :1]


def _queries_kernel(
    plan: Plan, q, k, v, r, band, scale, own, theirs, grad, lse, mean, dquery, drel, dbands, sum_q, sum_r
):
    step = pl.program_id(3)
    n = plan.back - step

    @pl.when((pl.program_id(2) == 0) & (step == 0))
    def _():
        dbands[...] = jnp.zeros_like(dbands)

    @pl.when(step == 0)
    def _():
        sum_q[...] = jnp.zeros_like(sum_q)
        sum_r[...] = jnp.zeros_like(sum_r)

    @pl.when(pl.program_id(2) >= n)
    def _():
        _, dlogits = _dlogits(plan, n, q, k, v, r, band, scale, own, theirs, grad, lse, mean)
        sum_q[...] += _dot(dlogits.astype(k.dtype), k[0, 0], 1, 0)

        @pl.when(n < plan.biased)
        def _():
            c = plan.block
            wide = jnp.concatenate([dlogits, jnp.zeros_like(dlogits)], axis=1)
            dprofile = turned_back(wide, c).astype(band.dtype)
            sum_r[...] += _dot(dprofile, band[0], 1, 1)
            dbands[0, 0, n] += _dot(r[0, 0], dprofile, 0, 0)

    @pl.when(step == plan.back)
    def _():
        dquery[0, 0] = sum_q[...]
        drel[0, 0] = sum_r[...]


def _keys_kernel(plan: Plan, q, k, v, r, band, scale, own, theirs, grad, lse, mean, dkeys, dvalues, sum_k, sum_v):
    n = pl.program_id(3)

    @pl.when(n == 0)
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    @pl.when(pl.program_id(2) + n < plan.blocks)
    def _():
        weights, dlogits = _dlogits(plan, n, q, k, v, r, band, scale, own, theirs, grad, lse, mean)
        sum_v[...] += _dot(weights.astype(grad.dtype), grad[0, 0], 0, 0)
        sum_k[...] += _dot(dlogits.astype(q.dtype), q[0, 0], 0, 0)

    @pl.when(n == plan.back)
    def _():
        dkeys[0, 0] = sum_k[...]
        dvalues[0, 0] = sum_v[...]


# --- the calls


def _inputs(plan: Plan, query, keys, rel, bands, by_keys: bool) -> list[pl.BlockSpec]:
    """Blocks of query, keys, values, rel, bands, scale and segments (as rows and as columns) for one grid step.

    The grid is `(B, H, block, distance)`; the block is one of queries, or of keys with `by_keys`. Where a step is to be
    skipped, the index is that of a neighbour: nothing is fetched for it.
    """
    c, per_group = plan.block, query.shape[1] // keys.shape[1]

    def at(i: Any, j: Any) -> tuple[Any, Any, Any]:
        """(block of queries, block of keys, distance)."""
        if by_keys:
            return jnp.minimum(i + j, plan.blocks - 1), i, j
        n = plan.back - j
        return i, jnp.maximum(i - n, 0), n

    def of_queries(b, h, i, j):
        return b, h, at(i, j)[0], 0

    def of_keys(b, h, i, j):
        return b, h // per_group, at(i, j)[1], 0

    return [
        pl.BlockSpec((1, 1, c, query.shape[3]), of_queries),
        pl.BlockSpec((1, 1, c, keys.shape[3]), of_keys),
        pl.BlockSpec((1, 1, c, keys.shape[3]), of_keys),
        pl.BlockSpec((1, 1, c, rel.shape[3]), of_queries),
        pl.BlockSpec(
            (1, *bands.shape[1:]), lambda b, h, i, j: (jnp.minimum(at(i, j)[2], plan.biased - 1), 0, 0)
        ),
        pl.BlockSpec((c, TPU_LANES), lambda b, h, i, j: (at(i, j)[0], 0)),
        pl.BlockSpec((1, c, TPU_LANES), lambda b, h, i, j: (b, at(i, j)[0], 0)),
        pl.BlockSpec((1, 8, c), lambda b, h, i, j: (b, 0, at(i, j)[1])),
    ]  # fmt: skip


def _call(plan: Plan, kernel: Any, query: jax.Array, inputs: Any, outputs: Any, scratch: Any, arrays: Any, flops: int):
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


def _by_row(plan: Plan, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, plan.block, width), lambda b, h, i, j: (b, h, i, 0))


def _given(plan: Plan, query, keys, values, rel, bands, scale, segments) -> tuple[jax.Array, ...]:
    """The arrays of `_inputs`."""
    columns = jnp.broadcast_to(segments[:, None], (segments.shape[0], 8, plan.tokens))
    return query, keys, values, rel, bands, _lanes(scale), _lanes(segments), columns


def _forward(plan: Plan, query, keys, values, rel, bands, scale, segments):
    c, width = plan.block, query.shape[3]
    rows = query.shape[:3]
    out, lse = _call(
        plan,
        _forward_kernel,
        query,
        _inputs(plan, query, keys, rel, bands, by_keys=False),
        [
            (_by_row(plan, width), jax.ShapeDtypeStruct(query.shape, query.dtype)),
            (_by_row(plan, TPU_LANES), jax.ShapeDtypeStruct((*rows, TPU_LANES), jnp.float32)),
        ],
        [(c, TPU_LANES), (c, TPU_LANES), (c, width)],
        _given(plan, query, keys, values, rel, bands, scale, segments),
        4 * width + 4 * rel.shape[3],
    )
    return out, lse


def _backward_queries(plan: Plan, query, keys, values, rel, bands, scale, segments, grad, lse, mean):
    c, width, rank = plan.block, query.shape[3], rel.shape[3]
    batch, heads = query.shape[:2]
    shape = (batch, heads, *bands.shape)
    whole = pl.BlockSpec((1, 1, *bands.shape), lambda b, h, i, j: (b, h, 0, 0, 0))
    return _call(
        plan,
        _queries_kernel,
        query,
        [*_inputs(plan, query, keys, rel, bands, by_keys=False), *_extra(plan, width, by_keys=False)],
        [
            (_by_row(plan, width), jax.ShapeDtypeStruct(query.shape, jnp.float32)),
            (_by_row(plan, rank), jax.ShapeDtypeStruct(rel.shape, jnp.float32)),
            (whole, jax.ShapeDtypeStruct(shape, jnp.float32)),
        ],
        [(c, width), (c, rank)],
        (*_given(plan, query, keys, values, rel, bands, scale, segments), grad, lse, mean),
        6 * width + 12 * rank,
    )


def _backward_keys(plan: Plan, query, keys, values, rel, bands, scale, segments, grad, lse, mean):
    c, width = plan.block, query.shape[3]
    return _call(
        plan,
        _keys_kernel,
        query,
        [*_inputs(plan, query, keys, rel, bands, by_keys=True), *_extra(plan, width, by_keys=True)],
        [(_by_row(plan, width), jax.ShapeDtypeStruct(query.shape, jnp.float32))] * 2,
        [(c, width), (c, width)],
        (*_given(plan, query, keys, values, rel, bands, scale, segments), grad, lse, mean),
        8 * width + 4 * rel.shape[3],
    )


def _extra(plan: Plan, width: int, by_keys: bool) -> list[pl.BlockSpec]:
    """Blocks of the incoming gradient, the logarithm of the softmax' sum and the mean, by query."""

    def at(b, h, i, j):
        return b, h, jnp.minimum(i + j, plan.blocks - 1) if by_keys else i, 0

    return [pl.BlockSpec((1, 1, plan.block, n), at) for n in (width, TPU_LANES, TPU_LANES)]
