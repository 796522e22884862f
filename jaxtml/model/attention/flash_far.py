"""Attention to far tokens as TPU kernels: pinned and retained tokens beyond the window (`retention`).

Axes: B batch, G key/value heads, H query heads, K head width, F far tokens and as many queries, in N blocks of C.
Called by `sequence`, which joins the result with that of `flash`.

This is `far_blocks` with kernels in place of loops: the same list of tokens, the same blocks, the same visits. Which
blocks a block of queries visits depends on the conversation. So the visits are computed first, and the kernels read
them as scalars before they fetch a block. The grid is as long as the most visits that any block makes. Steps beyond a
block's own visits repeat the index of its last visit, so nothing is fetched for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtml.model.attention.far_blocks import FarPlan, FarVisits, is_visible, plan_visits, visited_block
from jaxtml.model.attention.flash import Ref, SumRefs, differentiate_logits, dot, repeat_over_lanes
from jaxtml.model.attention.retention import FarTokens
from jaxtml.model.numerics import MASKED_LOGIT
from jaxtml.parallel.chips import TPU_LANES


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash_far_attention(
    plan: FarPlan,
    interpret: bool,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    far: FarTokens,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention to far tokens.

    Args:
      plan: from `plan_far_blocks`, with blocks of a multiple of 128; F = N C below.
      interpret: run the kernels as plain operations, for machines without a TPU.
      query: `[B, H, F, K]`.
      keys, values: `[B, G, F, K]`, those of the list.
      scale: `[F]` float32, the factor of each query's logits.
      far: from `pad_far_tokens`.

    Returns:
      `[B, H, F, K]` in the dtype of `query`, and the logarithm of each query's softmax sum, `[B, H, F]` float32. Where
      a query sees no far token, they are zero and about `MASKED_LOGIT`.
    """
    out, lse = _forward(plan, interpret, query, keys, values, scale, far)
    return out, lse[..., 0]


def _attend_fwd(plan, interpret, query, keys, values, scale, far):
    out, lse = _forward(plan, interpret, query, keys, values, scale, far)
    return (out, lse[..., 0]), (query, keys, values, scale, far, out, lse)


def _attend_bwd(plan, interpret, residuals, grads):
    query, keys, values, scale, far, out, lse = residuals
    grad, grad_lse = grads
    mean = repeat_over_lanes((grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - grad_lse)
    call = partial(_call, plan, interpret, query, keys, values, scale, far, [grad, lse, mean])
    width, gradient = query.shape[3], jax.ShapeDtypeStruct(query.shape, jnp.float32)
    (dquery,) = call(_queries_kernel, _by_queries(plan, far), 6 * width, [gradient])
    dkeys, dvalues = call(_keys_kernel, _by_entries(plan, far), 8 * width, [gradient] * 2)

    def sum_heads(d: jax.Array) -> jax.Array:  # [B, H, F, K] -> [B, G, F, K]
        return d.reshape(*keys.shape[:2], -1, *d.shape[2:]).sum(axis=2).astype(keys.dtype)

    return dquery.astype(query.dtype), sum_heads(dkeys), sum_heads(dvalues), None, None


flash_far_attention.defvjp(_attend_fwd, _attend_bwd)


class _Steps(NamedTuple):
    """The steps of a kernel's grid for each of its blocks.

    Attributes:
      first, count: `[B, N]` int32. If the grid's blocks are blocks of queries, they are those of `FarVisits`. If the
        grid's blocks are blocks of the list, `first` is the first of the consecutive blocks of queries that visit such
        a block, and `count` is their number.
      by_entries: whether the grid's blocks are blocks of the list.
    """

    first: jax.Array
    count: jax.Array
    by_entries: bool


def _by_queries(plan: FarPlan, far: FarTokens) -> _Steps:
    return _Steps(*plan_visits(plan, far), by_entries=False)


def _by_entries(plan: FarPlan, far: FarTokens) -> _Steps:
    """Finds the blocks of queries that visit each block of the list.

    They are consecutive: the visits of a block of queries begin and end no earlier in the list than those of the block
    of queries before it.
    """
    visits: FarVisits = plan_visits(plan, far)
    stop = visits.first + visits.count - (plan.pinned > 0)
    block = jnp.arange(plan.count)
    search = jax.vmap(partial(jnp.searchsorted, side="right"), (0, None))
    begin, end = search(stop, block), search(visits.first, block)
    if plan.pinned:
        begin, end = begin.at[:, 0].set(0), end.at[:, 0].set(plan.count)
    return _Steps(begin.astype(jnp.int32), jnp.maximum(end - begin, 0).astype(jnp.int32), by_entries=True)


# --- Inside the kernels.


class _OperandRefs(NamedTuple):
    """References to the blocks of the operands for one grid step, in the order in which `_call` passes them.

    Attributes:
      query, keys, values: `[1, 1, C, K]`.
      scale: `[C, TPU_LANES]`, the same in all columns.
      end: `[1, C, TPU_LANES]`, the same in all columns.
      position: `[1, 8, C]`, the same in all rows.
    """

    query: Ref
    keys: Ref
    values: Ref
    scale: Ref
    end: Ref
    position: Ref


def _logits(plan: FarPlan, i: jax.Array, block: jax.Array, refs: _OperandRefs) -> jax.Array:
    """Returns the masked logits `[C, C]` float32 of block i of queries for a block of the list."""
    c = plan.size
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
    logits = dot(refs.query[0, 0], refs.keys[0, 0], 1, 1) * refs.scale[:, :1]
    own, entry = plan.window + i * c + rows, block * c + columns
    return jnp.where(is_visible(plan, entry, refs.position[0, :1], own, refs.end[0, :, :1]), logits, MASKED_LOGIT)


def _forward_kernel(plan: FarPlan, first: Ref, count: Ref, *all_refs: Ref) -> None:
    """Adds one block of the list to the softmax of a block of queries."""
    refs = _OperandRefs(*all_refs[:6])
    out, lse, *scratch = all_refs[6:]
    sums = SumRefs(*scratch)
    b, i, visit = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    pl.when(visit == 0)(sums.begin)

    @pl.when(visit < count[b, i])
    def _():
        sums.add_keys(_logits(plan, i, visited_block(plan, first[b, i], visit), refs), refs.values)

    @pl.when(visit == pl.num_programs(3) - 1)
    def _():
        sums.finish(out, lse)


def _queries_kernel(plan: FarPlan, first: Ref, count: Ref, *all_refs: Ref) -> None:
    """Adds one block of the list to the gradient of a block of queries."""
    refs = _OperandRefs(*all_refs[:6])
    grad, lse, mean, dquery = all_refs[6:]
    b, i, visit = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(visit == 0)
    def _():
        dquery[...] = jnp.zeros_like(dquery)

    @pl.when(visit < count[b, i])
    def _():
        logits = _logits(plan, i, visited_block(plan, first[b, i], visit), refs)
        dlogits = differentiate_logits(logits, refs.values, refs.scale, grad, lse, mean)[1]
        dquery[0, 0] += dot(dlogits.astype(refs.keys.dtype), refs.keys[0, 0], 1, 0)


def _keys_kernel(plan: FarPlan, first: Ref, count: Ref, *all_refs: Ref) -> None:
    """Adds one block of queries to the gradients of a block of the list."""
    refs = _OperandRefs(*all_refs[:6])
    grad, lse, mean, dkeys, dvalues = all_refs[6:]
    b, block, visit = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(visit == 0)
    def _():
        dkeys[...] = jnp.zeros_like(dkeys)
        dvalues[...] = jnp.zeros_like(dvalues)

    @pl.when(visit < count[b, block])
    def _():
        logits = _logits(plan, first[b, block] + visit, block, refs)
        weights, dlogits = differentiate_logits(logits, refs.values, refs.scale, grad, lse, mean)
        dvalues[0, 0] += dot(weights.astype(grad.dtype), grad[0, 0], 0, 0)
        dkeys[0, 0] += dot(dlogits.astype(refs.query.dtype), refs.query[0, 0], 0, 0)


# --- The calls of the kernels.


def _forward(plan: FarPlan, interpret: bool, query, keys, values, scale, far):
    """Returns attention `[B, H, F, K]`, and the logarithm of each softmax sum, `[B, H, F, TPU_LANES]` float32."""
    *rows, width = query.shape
    outputs = [jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((*rows, TPU_LANES), jnp.float32)]
    call = partial(_call, plan, interpret, query, keys, values, scale, far, [])
    return call(_forward_kernel, _by_queries(plan, far), 4 * width, outputs, SumRefs.shapes(plan.size, width))


def _call(
    plan: FarPlan,
    interpret: bool,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    far: FarTokens,
    residuals: Sequence[jax.Array],
    kernel: Callable[..., None],
    steps: _Steps,
    flops: int,
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, ...]] = (),
) -> Any:
    """Calls a kernel over the grid `(B, H, block, visit)`.

    Args:
      plan: the sizes.
      interpret: run the kernel as plain operations.
      query, keys, values, scale, far: see `flash_far_attention`.
      residuals: what the backward pass reads by query, `[B, H, F, .]`.
      kernel: its first arguments are the plan and the two arrays of `steps`.
      steps: which blocks meet in which step of the grid.
      flops: of one pair of a query and an entry, for the cost estimate.
      outputs: `[B, H, F, .]`, indexed by the grid's block.
      scratch: shapes of scratch memory, float32.
    """
    batch, heads, _, width = query.shape
    per_group = heads // keys.shape[1]

    def meeting(b, i, visit, first, count) -> tuple[jax.Array, jax.Array]:
        """Returns the block of queries and the block of the list."""
        visit = jnp.minimum(visit, jnp.maximum(count[b, i] - 1, 0))
        if steps.by_entries:
            return jnp.minimum(first[b, i] + visit, plan.count - 1), i
        return i, jnp.minimum(visited_block(plan, first[b, i], visit), plan.count - 1)

    def of_queries(b, h, i, visit, first, count):
        return b, h, meeting(b, i, visit, first, count)[0], 0

    def of_entries(b, h, i, visit, first, count):
        return b, h // per_group, meeting(b, i, visit, first, count)[1], 0

    c = plan.size
    in_specs = [
        pl.BlockSpec((1, 1, c, width), of_queries),
        pl.BlockSpec((1, 1, c, width), of_entries),
        pl.BlockSpec((1, 1, c, width), of_entries),
        pl.BlockSpec((c, TPU_LANES), lambda *index: of_queries(*index)[2:]),
        pl.BlockSpec((1, c, TPU_LANES), lambda b, *rest: (b, *of_queries(b, *rest)[2:])),
        pl.BlockSpec((1, 8, c), lambda b, *rest: (b, 0, of_entries(b, *rest)[2])),
        *(pl.BlockSpec((1, 1, c, a.shape[3]), of_queries) for a in residuals),
    ]
    arrays = (
        *(query, keys, values, repeat_over_lanes(scale), repeat_over_lanes(far.end)),
        jnp.broadcast_to(far.position[:, None], (batch, 8, plan.count * c)),
        *residuals,
    )
    # How many blocks are visited depends on the conversation. The estimate is for one whose list is long.
    pairs = batch * heads * plan.count * min(plan.count, plan.retained // c + 1) * c**2
    return pl.pallas_call(
        partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, plan.count, jnp.maximum(steps.count.max(), 1)),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((1, 1, c, a.shape[3]), lambda b, h, i, *_: (b, h, i, 0)) for a in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=pairs * flops,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
            transcendentals=pairs,
        ),
        interpret=interpret,
    )(steps.first, steps.count, *arrays)
