"""Attention of long sequences without a TPU kernel: one block of queries and one block of keys at a time.

Axes: B batch, G key/value heads, Q query heads per key/value head, T tokens in N blocks of C, K head width, R width of
the relative state, L columns of the bias table, V visits of a block of queries. Called by `sequence`.

No array of the size `[T, T]` or `[T, extent]` is ever in memory: this is flash attention as plain operations
(`online_softmax`). A block of queries visits only blocks of keys that one of its queries sees.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.online_softmax import SoftmaxSums, add_keys, begin_softmax, finish_softmax, probabilities
from jaxtml.model.numerics import MASKED_LOGIT, einsum_float32


class Blocks(NamedTuple):
    """The sizes of one call, all static.

    Attributes:
      count: N, blocks of a sequence.
      size: C, tokens of a block.
      window: distances `[0, window)` are seen.
      pinned: the first tokens of a sequence, which are seen at any distance.
      bias_distances: there is a bias for keys that stand fewer than this many blocks before the block of queries.
    """

    count: int
    size: int
    window: int
    pinned: int
    bias_distances: int

    @property
    def back(self) -> int:
        """How many blocks before its own a query can see, apart from pinned tokens."""
        return min(-(-(self.window - 1) // self.size), self.count - 1)

    @property
    def visits(self) -> int:
        """V, the blocks of keys that a block of queries may visit: its own, those before it, and the pinned block."""
        return self.back + 1 + (self.pinned > 0 and self.back < self.count - 1)


def plan_blocks(config: AttentionConfig, tokens: int, size: int) -> Blocks:
    """Plans blocks of `size` tokens, of which the last is padded. Pinned tokens must fit into the first block."""
    count = -(-tokens // size)
    bias_distances = min((config.rel_extent + size - 2) // size + 1, count)
    assert config.pinned <= size, f"{config.pinned} pinned tokens in blocks of {size}"
    return Blocks(count, size, config.window, config.pinned, bias_distances)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_blocks(
    blocks: Blocks, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes causal attention of whole sequences.

    Args:
      blocks: from `plan_blocks`; T = N C below.
      query: `[B, G, Q, T, K]`, scaled.
      keys, values: `[B, G, T, K]`.
      rel: `[B, G, Q, T, R]`, scaled.
      table: `[C, R, L]` from `sequence.bias_table`, for the keys of the last `bias_distances` blocks.

    Returns:
      `[B, G, Q, T, K]` in the dtype of `query`, and the logarithm of each query's softmax sum, `[B, G, Q, T]` float32.
    """
    return _forward(blocks, query, keys, values, rel, table)


class _Visit(NamedTuple):
    """A visit of a block of queries to a block of keys.

    Attributes:
      key: the index of the block of keys.
      distance: how many blocks the block of keys stands before the block of queries.
      needed: whether the block of keys exists and has not been visited already.
    """

    key: jax.Array
    distance: jax.Array
    needed: jax.Array


def _visit(blocks: Blocks, i: jax.Array, v: jax.Array) -> _Visit:
    """Returns visit v of block i of queries.

    The visits begin at the block itself and go backwards. After them comes the visit to the pinned block.
    """
    near = v <= blocks.back
    key = jnp.where(near, i - v, 0)
    return _Visit(jnp.maximum(key, 0), i - key, (key >= 0) & (near | (i > blocks.back)))


def _block(a: jax.Array, blocks: Blocks, i: jax.Array, axis: int) -> jax.Array:
    """Cuts block i out of the axis of tokens."""
    return jax.lax.dynamic_slice_in_dim(a, i * blocks.size, blocks.size, axis)


def _logits(
    blocks: Blocks, i: jax.Array, visit: _Visit, query: jax.Array, key: jax.Array, rel: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns the masked logits `[B, G, Q, C, C]` float32 of block i of queries and the visited block of keys."""
    logits = einsum_float32("bgqik,bgjk->bgqij", query, key)
    columns = _table_columns(blocks, visit, table)
    bias = jax.lax.cond(
        visit.distance < blocks.bias_distances,
        lambda: einsum_float32("bgqir,irj->bgqij", rel, columns),
        lambda: jnp.zeros_like(logits),
    )
    offset = jnp.arange(blocks.size)
    key_position = visit.key * blocks.size + offset
    distance = (i * blocks.size + offset)[:, None] - key_position
    visible = (distance >= 0) & ((distance < blocks.window) | (key_position < blocks.pinned))
    return jnp.where(visible, logits + bias, MASKED_LOGIT)


def _first_column(blocks: Blocks, visit: _Visit) -> jax.Array:
    """Returns the first of the table's columns for a visit."""
    return jnp.clip(blocks.bias_distances - 1 - visit.distance, 0, blocks.bias_distances - 1) * blocks.size


def _table_columns(blocks: Blocks, visit: _Visit, table: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(table, _first_column(blocks, visit), blocks.size, axis=2)


def _forward(blocks: Blocks, query, keys, values, rel, table):
    """Returns attention `[B, G, Q, T, K]` and the logarithm of each query's softmax sum, `[B, G, Q, T]` float32."""

    def attend_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        query_i, rel_i = _block(query, blocks, i, 3), _block(rel, blocks, i, 3)

        def visit_keys(sums: SoftmaxSums, v: jax.Array) -> tuple[SoftmaxSums, None]:
            visit = _visit(blocks, i, v)

            def run() -> SoftmaxSums:
                logits = _logits(blocks, i, visit, query_i, _block(keys, blocks, visit.key, 2), rel_i, table)
                value = _block(values, blocks, visit.key, 2)
                return add_keys(sums, logits, value, partial(einsum_float32, "bgqij,bgjk->bgqik"))

            return jax.lax.cond(visit.needed, run, lambda: sums), None

        sums, _ = jax.lax.scan(visit_keys, begin_softmax(query_i.shape), jnp.arange(blocks.visits))
        out, lse = finish_softmax(sums)
        return out.astype(query.dtype), lse[..., 0]

    out, lse = jax.lax.map(attend_block, jnp.arange(blocks.count))
    out = jnp.moveaxis(out, 0, 3).reshape(query.shape)
    return out, jnp.moveaxis(lse, 0, 3).reshape(query.shape[:-1])


def _attend_fwd(blocks, query, keys, values, rel, table):
    out, lse = _forward(blocks, query, keys, values, rel, table)
    return (out, lse), (query, keys, values, rel, table, out, lse)


def _attend_bwd(blocks, residuals, grads):
    query, keys, values, rel, table, out, lse = residuals
    grad, grad_lse = grads
    dtype = query.dtype
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - grad_lse

    def differentiate_block(
        sums: tuple[jax.Array, ...], i: jax.Array
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        query_i, rel_i, grad_i, lse_i, mean_i = (_block(a, blocks, i, 3) for a in (query, rel, grad, lse, mean))

        def visit_keys(carry: tuple[jax.Array, ...], v: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            visit = _visit(blocks, i, v)

            def run() -> tuple[jax.Array, ...]:
                dkeys, dvalues, dtable, dquery, drel = carry
                key, value = _block(keys, blocks, visit.key, 2), _block(values, blocks, visit.key, 2)
                logits = _logits(blocks, i, visit, query_i, key, rel_i, table)
                weights = probabilities(logits, lse_i[..., None])
                dweights = einsum_float32("bgqik,bgjk->bgqij", grad_i, value)
                dlogits = (weights * (dweights - mean_i[..., None])).astype(dtype)
                dkey = einsum_float32("bgqij,bgqik->bgjk", dlogits, query_i)
                dkeys = _add_to_block(dkeys, dkey, blocks, visit.key)
                dvalue = einsum_float32("bgqij,bgqik->bgjk", weights.astype(dtype), grad_i)
                dvalues = _add_to_block(dvalues, dvalue, blocks, visit.key)
                dquery = dquery + einsum_float32("bgqij,bgjk->bgqik", dlogits, key)

                def differentiate_bias() -> tuple[jax.Array, jax.Array]:
                    part = einsum_float32("bgqir,bgqij->irj", rel_i, dlogits)
                    column = _first_column(blocks, visit)
                    old = jax.lax.dynamic_slice_in_dim(dtable, column, blocks.size, axis=2)
                    new = jax.lax.dynamic_update_slice_in_dim(dtable, old + part, column, axis=2)
                    columns = _table_columns(blocks, visit, table)
                    return new, drel + einsum_float32("bgqij,irj->bgqir", dlogits, columns)

                has_bias = visit.distance < blocks.bias_distances
                new_dtable, new_drel = jax.lax.cond(has_bias, differentiate_bias, lambda: (dtable, drel))
                return dkeys, dvalues, new_dtable, dquery, new_drel

            return jax.lax.cond(visit.needed, run, lambda: carry), None

        empty = (jnp.zeros(query_i.shape, jnp.float32), jnp.zeros(rel_i.shape, jnp.float32))
        (*new_sums, dquery, drel), _ = jax.lax.scan(visit_keys, (*sums, *empty), jnp.arange(blocks.visits))
        return tuple(new_sums), (dquery.astype(dtype), drel.astype(dtype))

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (keys, values, table))
    (dkeys, dvalues, dtable), parts = jax.lax.scan(differentiate_block, zeros, jnp.arange(blocks.count))
    dquery, drel = (jnp.moveaxis(p, 0, 3).reshape(a.shape) for p, a in zip(parts, (query, rel), strict=True))
    return dquery, dkeys.astype(dtype), dvalues.astype(dtype), drel, dtable.astype(table.dtype)


attend_blocks.defvjp(_attend_fwd, _attend_bwd)


def _add_to_block(sums: jax.Array, part: jax.Array, blocks: Blocks, key: jax.Array) -> jax.Array:
    """Adds `part` to one block of `sums` `[B, G, T, K]`, in place."""
    old = _block(sums, blocks, key, 2)
    return jax.lax.dynamic_update_slice_in_dim(sums, old + part, key * blocks.size, axis=2)
