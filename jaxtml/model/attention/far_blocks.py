"""Attention to far tokens without a TPU kernel: one block of queries and one block of far tokens at a time.

Far tokens are pinned or retained tokens beyond the window (`retention`). Called by `sequence`, which joins the result
with attention within the window.

Axes: B batch, G key/value heads, Q query heads per key/value head, K head width, F far tokens and as many queries, in N
blocks of C.

Query f is the token at position `window + f`, because earlier tokens have no far tokens. Entry f of the list is a token
at position f or later. So a block of queries sees nothing in later blocks of the list than its own. Of the others it
visits those that one of its queries sees. They differ from row to row, and their number is known only at run time.
There is no bias: `AttentionConfig.check` keeps the relative extent within the window.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.cache import NOWHERE
from jaxtml.model.attention.online_softmax import SoftmaxSums, add_keys, begin_softmax, finish_softmax, probabilities
from jaxtml.model.attention.retention import FarTokens
from jaxtml.model.numerics import MASKED_LOGIT, einsum_float32


class FarPlan(NamedTuple):
    """The sizes of one call, all static.

    Attributes:
      count: N.
      size: C.
      window: far tokens are at least this far away from the query.
      pinned: the first entries of the list, which are visible to all queries.
      retained: how many of the other entries are visible to a query.
    """

    count: int
    size: int
    window: int
    pinned: int
    retained: int


class FarVisits(NamedTuple):
    """Which blocks of the list each block of queries visits.

    If there are pinned tokens, block 0 has all of them, and the first visit is to block 0. The other visits are to
    consecutive blocks.

    Attributes:
      first: `[B, N]` int32, the first of the consecutive blocks.
      count: `[B, N]` int32, the number of visits.
    """

    first: jax.Array
    count: jax.Array


def plan_far_blocks(config: AttentionConfig, count: int, size: int) -> FarPlan:
    """Plans blocks of `size` for `count` far tokens; the last block is padded."""
    return FarPlan(-(-count // size), size, config.window, config.pinned, config.retained)


def pad_far_tokens(plan: FarPlan, far: FarTokens) -> FarTokens:
    """Cuts `end` down to the queries that have far tokens, and pads both arrays to whole blocks: `[B, N C]` each."""
    padding = ((0, 0), (0, plan.count * plan.size - far.position.shape[1]))
    position = jnp.pad(far.position, padding, constant_values=NOWHERE)
    return FarTokens(position, jnp.pad(far.end[:, plan.window :], padding, "edge"))


def plan_visits(plan: FarPlan, far: FarTokens) -> FarVisits:
    """Plans the visits of all blocks of queries; `far` is from `pad_far_tokens`."""
    size = plan.size
    last_query = plan.window + size * jnp.arange(1, plan.count + 1) - 1
    least_end, most_end = far.end[:, ::size], far.end[:, size - 1 :: size]  # those of a block's first and last query
    beyond = jax.vmap(partial(jnp.searchsorted, side="right"), (0, None))(far.position, last_query - plan.window)
    # The last query sees nothing behind `stop`, and the first query sees nothing before `first` but pinned tokens.
    stop = -(-jnp.minimum(most_end, beyond) // size)
    first = jnp.maximum(least_end - plan.retained, 0) // size
    if plan.pinned:
        first = jnp.maximum(first, 1)
    return FarVisits(first.astype(jnp.int32), (jnp.maximum(stop - first, 0) + (plan.pinned > 0)).astype(jnp.int32))


def visited_block(plan: FarPlan, first: jax.Array, visit: jax.Array) -> jax.Array:
    """Returns the block of the list that a visit is for; see `FarVisits`."""
    if not plan.pinned:
        return first + visit
    return jnp.where(visit == 0, 0, first + visit - 1)


def is_visible(plan: FarPlan, entry: jax.Array, position: jax.Array, query: jax.Array, end: jax.Array) -> jax.Array:
    """Returns which entries of the list a query sees. The arguments broadcast against each other.

    Args:
      plan: window, pinned and retained tokens.
      entry: the number of the entry in the list.
      position: the position of its token.
      query: the position of the query.
      end: `FarTokens.end` of the query.
    """
    in_list = (entry < plan.pinned) | ((entry >= end - plan.retained) & (entry < end))
    return in_list & (position <= query - plan.window)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_far_blocks(
    plan: FarPlan, query: jax.Array, keys: jax.Array, values: jax.Array, far: FarTokens
) -> tuple[jax.Array, jax.Array]:
    """Computes attention to far tokens.

    Args:
      plan: from `plan_far_blocks`; F = N C below.
      query: `[B, G, Q, F, K]`, scaled.
      keys, values: `[B, G, F, K]`, those of the list.
      far: from `pad_far_tokens`.

    Returns:
      `[B, G, Q, F, K]` in the dtype of `query`, and the logarithm of each query's softmax sum, `[B, G, Q, F]` float32.
      Where a query sees no far token, they are zero and about `MASKED_LOGIT`.
    """
    return _forward(plan, query, keys, values, far)


def _queries(plan: FarPlan, a: jax.Array, i: jax.Array, axis: int = 3) -> jax.Array:
    """Cuts block i of the queries out of `axis`."""
    return jax.lax.dynamic_slice_in_dim(a, i * plan.size, plan.size, axis)


def _entries(plan: FarPlan, a: jax.Array, block: jax.Array) -> jax.Array:
    """Cuts a block of the list out of `[B, ..., F, K]`: for each row, its own element of `block` `[B]`."""
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=plan.size, axis=-2)
    return jax.vmap(cut)(a, block * plan.size)


def _logits(
    plan: FarPlan, i: jax.Array, block: jax.Array, needed: jax.Array, query: jax.Array, key: jax.Array, far: FarTokens
) -> jax.Array:
    """Returns the masked logits `[B, G, Q, C, C]` float32 of block i of queries for `block` `[B]` of each row's list.

    `needed` `[B]` bool says which rows make this visit: others have fewer visits, and see nothing.
    """
    offset = jnp.arange(plan.size)
    entry = (block[:, None] * plan.size + offset)[:, None]
    position = _entries(plan, far.position[..., None], block)[:, None, :, 0]
    own = (plan.window + i * plan.size + offset)[:, None]
    visible = is_visible(plan, entry, position, own, _queries(plan, far.end, i, 1)[..., None]) & needed[:, None, None]
    logits = einsum_float32("bgqik,bgfk->bgqif", query, key)
    return jnp.where(visible[:, None, None], logits, MASKED_LOGIT)


def _forward(plan: FarPlan, query, keys, values, far):
    visits = plan_visits(plan, far)

    def attend_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        query_i, first, count = _queries(plan, query, i), visits.first[:, i], visits.count[:, i]

        def visit_entries(visit: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
            block = visited_block(plan, first, visit)
            logits = _logits(plan, i, block, visit < count, query_i, _entries(plan, keys, block), far)
            return add_keys(sums, logits, _entries(plan, values, block), partial(einsum_float32, "bgqif,bgfk->bgqik"))

        sums = jax.lax.fori_loop(0, count.max(), visit_entries, begin_softmax(query_i.shape))
        out, lse = finish_softmax(sums)
        return out.astype(query.dtype), lse[..., 0]

    out, lse = jax.lax.map(attend_block, jnp.arange(plan.count))
    return jnp.moveaxis(out, 0, 3).reshape(query.shape), jnp.moveaxis(lse, 0, 3).reshape(query.shape[:-1])


def _attend_fwd(plan, query, keys, values, far):
    out, lse = _forward(plan, query, keys, values, far)
    return (out, lse), (query, keys, values, far, out, lse)


def _attend_bwd(plan, residuals, grads):
    query, keys, values, far, out, lse = residuals
    grad, grad_lse = grads
    dtype = query.dtype
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - grad_lse
    visits = plan_visits(plan, far)

    def differentiate_block(
        sums: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        query_i, grad_i, lse_i, mean_i = (_queries(plan, a, i) for a in (query, grad, lse, mean))
        first, count = visits.first[:, i], visits.count[:, i]

        def visit_entries(visit: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dkeys, dvalues, dquery = carry
            block = visited_block(plan, first, visit)
            key, value = _entries(plan, keys, block), _entries(plan, values, block)
            logits = _logits(plan, i, block, visit < count, query_i, key, far)
            weights = probabilities(logits, lse_i[..., None])
            dweights = einsum_float32("bgqik,bgfk->bgqif", grad_i, value)
            dlogits = (weights * (dweights - mean_i[..., None])).astype(dtype)
            dkeys = _add_to_entries(plan, dkeys, einsum_float32("bgqif,bgqik->bgfk", dlogits, query_i), block)
            dvalue = einsum_float32("bgqif,bgqik->bgfk", weights.astype(dtype), grad_i)
            dquery = dquery + einsum_float32("bgqif,bgfk->bgqik", dlogits, key)
            return dkeys, _add_to_entries(plan, dvalues, dvalue, block), dquery

        empty = jnp.zeros(query_i.shape, jnp.float32)
        *new_sums, dquery = jax.lax.fori_loop(0, count.max(), visit_entries, (*sums, empty))
        return (new_sums[0], new_sums[1]), dquery.astype(dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (dkeys, dvalues), parts = jax.lax.scan(differentiate_block, (zeros, zeros), jnp.arange(plan.count))
    dquery = jnp.moveaxis(parts, 0, 3).reshape(query.shape)
    return dquery, dkeys.astype(dtype), dvalues.astype(dtype), None


attend_far_blocks.defvjp(_attend_fwd, _attend_bwd)


def _add_to_entries(plan: FarPlan, sums: jax.Array, part: jax.Array, block: jax.Array) -> jax.Array:
    """Adds `part` `[B, G, C, K]` to each row's block of `sums` `[B, G, F, K]`, in place."""
    put = partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
    return jax.vmap(put)(sums, _entries(plan, sums, block) + part, block * plan.size)
