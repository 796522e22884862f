"""Attention of long sequences where there is no kernel for it: one block of queries and one of keys at a time.

Axes: B batch, G key/value heads, Q query heads of a group, T tokens in N blocks of C, K head width, R width of the
relative state, L columns of the bias table, V visits of a block of queries. Nothing of the size `[T, T]` or
`[T, extent]` is ever in memory: softmax runs over one block of keys after the other, the logarithm of its sum is kept,
and the backward pass makes the probabilities again (flash attention, Dao et al., 2022, as plain operations). Blocks
that no query of a block sees are not visited. Called by `attend`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import AttentionConfig
from jaxtml.model.numerics import MASKED_LOGIT, einsum_float32


class Blocks(NamedTuple):
    """Sizes of one call, all static."""

    count: int
    size: int
    window: int
    pinned: int
    biased: int  # distances between blocks at which there is a bias

    @property
    def back(self) -> int:
        """How many blocks before its own a query can see into, pinned tokens aside."""
        return min(-(-(self.window - 1) // self.size), self.count - 1)

    @property
    def visits(self) -> int:
        """Blocks of keys that a block of queries may visit: itself, those before it, and the pinned one."""
        return self.back + 1 + (self.pinned > 0 and self.back < self.count - 1)


def plan(config: AttentionConfig, tokens: int, size: int) -> Blocks:
    """Blocks of `size` tokens, the last one filled up; pinned tokens have to fit into the first."""
    count = -(-tokens // size)
    biased = min((config.rel_extent + size - 2) // size + 1, count)
    assert config.pinned <= size, f"{config.pinned} pinned tokens in blocks of {size}"
    return Blocks(count, size, config.window, config.pinned, biased)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_blocks(
    blocks: Blocks, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, table: jax.Array
) -> jax.Array:
    """Causal attention of whole sequences.

    Args:
      blocks: from `plan`; T = N C below.
      query: `[B, G, Q, T, K]`, scaled.
      keys: `[B, G, T, K]`; `values` likewise.
      rel: `[B, G, Q, T, R]`, scaled.
      table: `[C, R, L]`, bias profiles by query and key of the last `biased` blocks, from `attend.bias_table`.

    Returns:
      `[B, G, Q, T, K]` in the dtype of `query`.
    """
    return _forward(blocks, query, keys, values, rel, table)[0]


class _Visit(NamedTuple):
    """A block of queries meets a block of keys: whose number is `key`, `apart` blocks before it, if it is `real`."""

    key: jax.Array
    apart: jax.Array
    real: jax.Array


def _visit(blocks: Blocks, i: jax.Array, v: jax.Array) -> _Visit:
    near = v <= blocks.back
    key = jnp.where(near, i - v, 0)
    return _Visit(jnp.maximum(key, 0), i - key, (key >= 0) & (near | (i > blocks.back)))


def _cut(a: jax.Array, blocks: Blocks, i: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, i * blocks.size, blocks.size, axis)


def _logits(blocks: Blocks, i: jax.Array, visit: _Visit, query: Any, key: Any, rel: Any, table: Any) -> jax.Array:
    """Masked logits `[B, G, Q, C, C]` float32 of block `i` of queries."""
    logits = einsum_float32("bgqik,bgjk->bgqij", query, key)
    near = _near(blocks, visit, table)
    bias = jax.lax.cond(
        visit.apart < blocks.biased,
        lambda: einsum_float32("bgqir,irj->bgqij", rel, near),
        lambda: jnp.zeros_like(logits),
    )
    at = jnp.arange(blocks.size)
    theirs = visit.key * blocks.size + at
    distance = (i * blocks.size + at)[:, None] - theirs
    visible = (distance >= 0) & ((distance < blocks.window) | (theirs < blocks.pinned))
    return jnp.where(visible, logits + bias, MASKED_LOGIT)


def _column(blocks: Blocks, visit: _Visit) -> jax.Array:
    """Where in the table the columns of a visit begin."""
    return jnp.clip(blocks.biased - 1 - visit.apart, 0, blocks.biased - 1) * blocks.size


def _near(blocks: Blocks, visit: _Visit, table: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(table, _column(blocks, visit), blocks.size, axis=2)


def _forward(blocks: Blocks, query, keys, values, rel, table):
    def one_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, state = _cut(query, blocks, i, 3), _cut(rel, blocks, i, 3)

        def meet(carry: tuple[jax.Array, ...], v: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            visit = _visit(blocks, i, v)

            def run() -> tuple[jax.Array, ...]:
                most, total, sum_ = carry
                logits = _logits(blocks, i, visit, own, _cut(keys, blocks, visit.key, 2), state, table)
                now = jnp.maximum(most, logits.max(axis=-1, keepdims=True))
                weights = jnp.where(logits > MASKED_LOGIT / 2, jnp.exp(logits - now), 0)
                shrink = jnp.exp(most - now)
                theirs = _cut(values, blocks, visit.key, 2)
                sum_ = sum_ * shrink + einsum_float32("bgqij,bgjk->bgqik", weights.astype(theirs.dtype), theirs)
                return now, total * shrink + weights.sum(axis=-1, keepdims=True), sum_

            return jax.lax.cond(visit.real, run, lambda: carry), None

        column = jnp.zeros((*own.shape[:-1], 1), jnp.float32)
        empty = (column + MASKED_LOGIT, column, jnp.zeros(own.shape, jnp.float32))
        (most, total, sum_), _ = jax.lax.scan(meet, empty, jnp.arange(blocks.visits))
        return (sum_ / total).astype(query.dtype), (most + jnp.log(total))[..., 0]

    out, lse = jax.lax.map(one_block, jnp.arange(blocks.count))
    out = jnp.moveaxis(out, 0, 3).reshape(query.shape)
    return out, jnp.moveaxis(lse, 0, 3).reshape(query.shape[:-1])


def _attend_fwd(blocks, query, keys, values, rel, table):
    out, lse = _forward(blocks, query, keys, values, rel, table)
    return out, (query, keys, values, rel, table, out, lse)


def _attend_bwd(blocks, saved, grad):
    query, keys, values, rel, table, out, lse = saved
    dtype = query.dtype
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def one_block(sums: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        own, state, incoming, logsum, centre = (_cut(a, blocks, i, 3) for a in (query, rel, grad, lse, mean))

        def meet(carry: Any, v: jax.Array) -> tuple[Any, None]:
            visit = _visit(blocks, i, v)

            def run() -> Any:
                dkeys, dvalues, dtable, dquery, drel = carry
                key, theirs = _cut(keys, blocks, visit.key, 2), _cut(values, blocks, visit.key, 2)
                logits = _logits(blocks, i, visit, own, key, state, table)
                weights = jnp.where(logits > MASKED_LOGIT / 2, jnp.exp(logits - logsum[..., None]), 0)
                dweights = einsum_float32("bgqik,bgjk->bgqij", incoming, theirs)
                dlogits = (weights * (dweights - centre[..., None])).astype(dtype)
                dkeys = _add(dkeys, einsum_float32("bgqij,bgqik->bgjk", dlogits, own), blocks, visit.key)
                dvalues = _add(
                    dvalues, einsum_float32("bgqij,bgqik->bgjk", weights.astype(dtype), incoming), blocks, visit.key
                )
                dquery = dquery + einsum_float32("bgqij,bgjk->bgqik", dlogits, key)

                def biased() -> tuple[jax.Array, jax.Array]:
                    part = einsum_float32("bgqir,bgqij->irj", state, dlogits)
                    column = _column(blocks, visit)
                    old = jax.lax.dynamic_slice_in_dim(dtable, column, blocks.size, axis=2)
                    changed = jax.lax.dynamic_update_slice_in_dim(dtable, old + part, column, axis=2)
                    return changed, drel + einsum_float32("bgqij,irj->bgqir", dlogits, _near(blocks, visit, table))

                changed, more = jax.lax.cond(visit.apart < blocks.biased, biased, lambda: (dtable, drel))
                return dkeys, dvalues, changed, dquery, more

            return jax.lax.cond(visit.real, run, lambda: carry), None

        empty = (jnp.zeros(own.shape, jnp.float32), jnp.zeros(state.shape, jnp.float32))
        (*after, dquery, drel), _ = jax.lax.scan(meet, (*sums, *empty), jnp.arange(blocks.visits))
        return tuple(after), (dquery.astype(dtype), drel.astype(dtype))

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (keys, values, table))
    (dkeys, dvalues, dtable), parts = jax.lax.scan(one_block, zeros, jnp.arange(blocks.count))
    dquery, drel = (jnp.moveaxis(p, 0, 3).reshape(a.shape) for p, a in zip(parts, (query, rel), strict=True))
    return dquery, dkeys.astype(dtype), dvalues.astype(dtype), drel, dtable.astype(table.dtype)


attend_blocks.defvjp(_attend_fwd, _attend_bwd)


def _add(sums: jax.Array, part: jax.Array, blocks: Blocks, key: jax.Array) -> jax.Array:
    """Adds to one block of `[B, G, T, K]`, in place."""
    old = _cut(sums, blocks, key, 2)
    return jax.lax.dynamic_update_slice_in_dim(sums, old + part, key * blocks.size, axis=2)
