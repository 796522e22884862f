"""The softmax of flash attention, over one block of keys after the other.

Flash attention (Dao et al., 2022) never has the logits of all keys in memory. It keeps three sums for each query, and
corrects them whenever a block has a larger logit. The backward pass computes the probabilities again, from the
logarithm of the softmax's sum.

Called by `blockwise`, `far_blocks` and `cache`, and inside the TPU kernels of `flash` and `flash_far`. Logits of keys
that a query does not see are `MASKED_LOGIT`. Axes: S keys of a block, K head width; any axes may come before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.numerics import MASKED_LOGIT


class SoftmaxSums(NamedTuple):
    """What is known of each query's softmax after some blocks of keys, all float32.

    Attributes:
      largest: `[..., 1]`, the largest logit so far; `MASKED_LOGIT` before the first visible key.
      total: `[..., 1]`, the sum of exp(logit - largest).
      weighted: `[..., K]`, the sum of the values, weighted by these exponentials.
    """

    largest: jax.Array
    total: jax.Array
    weighted: jax.Array


def begin_softmax(shape: tuple[int, ...]) -> SoftmaxSums:
    """Returns the sums over no key, for queries `[..., K]` of this shape."""
    zero = jnp.zeros((*shape[:-1], 1), jnp.float32)
    return SoftmaxSums(zero + MASKED_LOGIT, zero, jnp.zeros(shape, jnp.float32))


def add_keys(
    sums: SoftmaxSums, logits: jax.Array, values: jax.Array, weigh: Callable[[jax.Array, jax.Array], jax.Array]
) -> SoftmaxSums:
    """Adds a block of keys.

    Args:
      sums: over the keys before.
      logits: `[..., S]` float32.
      values: of the block, in any layout that `weigh` takes.
      weigh: returns the weighted sum of values `[..., K]` float32; takes weights `[..., S]` and `values`.
    """
    largest = jnp.maximum(sums.largest, logits.max(axis=-1, keepdims=True))
    weights = jnp.where(logits > MASKED_LOGIT / 2, jnp.exp(logits - largest), 0.0)
    shrink = jnp.exp(sums.largest - largest)
    total = sums.total * shrink + weights.sum(axis=-1, keepdims=True)
    return SoftmaxSums(largest, total, sums.weighted * shrink + weigh(weights.astype(values.dtype), values))


def finish_softmax(sums: SoftmaxSums) -> tuple[jax.Array, jax.Array]:
    """Returns attention `[..., K]`, and the logarithm of each query's softmax sum `[..., 1]`, float32 both.

    Where a query sees no key, they are zero and `MASKED_LOGIT`.
    """
    total = jnp.where(sums.total > 0, sums.total, 1.0)
    return sums.weighted / total, sums.largest + jnp.log(total)


def probabilities(logits: jax.Array, lse: jax.Array) -> jax.Array:
    """Returns the probabilities of a block's keys `[..., S]`; `lse` `[..., 1]` is from `finish_softmax`."""
    return jnp.where(logits > MASKED_LOGIT / 2, jnp.exp(logits - lse), 0.0)
