"""Cross-entropy over the vocabulary without all logits in memory: one chunk of columns after the other.

Axes: N positions, D model width, V tokens of the vocabulary that this device holds, C tokens of a chunk. Called by
`interaction` in training.

4,096 positions have 3.3 GB of float32 logits over Inkling's vocabulary, and a gradient of the same size. The vocabulary
is cut into chunks, not the positions: the gradient of each column is then complete at once, and a chunk's weights are
fetched only when the chunk is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.numerics import MASKED_LOGIT
from jaxtml.model.placement import TENSOR
from jaxtml.parallel.collectives import pmax, psum_backward, psum_forward
from jaxtml.parallel.mesh import MeshShape

MAX_LOGITS = 2**27  # of one chunk: half a gigabyte in float32


class Scores(NamedTuple):
    """How well each target was predicted.

    Attributes:
      nll: `[N]` float32, negative log-likelihood in nats.
      right: `[N]` bool, whether no token is likelier than the target.
    """

    nll: jax.Array
    right: jax.Array


class _RunningSoftmax(NamedTuple):
    """What is known after some chunks, `[N]` float32 each.

    Attributes:
      largest: the largest logit.
      total: the sum of exp(logit - largest).
      target: the target's logit; 0 until the target's chunk has been computed.
    """

    largest: jax.Array
    total: jax.Array
    target: jax.Array


def score_targets(
    hidden: jax.Array,
    unembed: jax.Array,
    target: jax.Array,
    mesh: MeshShape,
    fetch: Callable[[jax.Array], jax.Array] = lambda columns: columns,
) -> Scores:
    """Scores `target` `[N]` int32 from `hidden` `[N, D]`; the logits are `hidden @ unembed`.

    Args:
      hidden: `[N, D]`, the same on all devices of `tensor`.
      unembed: `[D or this device's part of D, V]`, a column for each token that this device holds. The devices of
        `tensor` hold consecutive parts of the vocabulary.
      target: `[N]` int32, the index of each target token in the complete vocabulary.
      mesh: the mesh on which the program runs.
      fetch: gathers some columns of `unembed`: as stored -> `[D, C]` in the dtype of `hidden`.
    """
    count = _count_chunks(len(hidden), unembed.shape[1])
    width = unembed.shape[1] // count
    first = unembed.shape[1] * jax.lax.axis_index("tensor") if mesh.tensor > 1 else 0
    hidden = psum_backward(hidden, mesh, TENSOR)

    def add_chunk(before: _RunningSoftmax, chunk: tuple[jax.Array, jax.Array]) -> tuple[_RunningSoftmax, None]:
        start, columns = chunk
        logits = _products(hidden, fetch(columns))
        column = target - start
        picked = jnp.take_along_axis(logits, jnp.clip(column, 0, width - 1)[:, None], axis=1)[:, 0]
        largest = jax.lax.stop_gradient(jnp.maximum(before.largest, logits.max(axis=1)))
        total = before.total * jnp.exp(before.largest - largest) + jnp.exp(logits - largest[:, None]).sum(axis=1)
        in_chunk = (column >= 0) & (column < width)
        return _RunningSoftmax(largest, total, before.target + jnp.where(in_chunk, picked, 0)), None

    zero = jnp.zeros(target.shape, jnp.float32)
    softmax = _RunningSoftmax(zero + MASKED_LOGIT, zero, zero)
    starts = first + width * jnp.arange(count)
    if count == 1:
        softmax, _ = add_chunk(softmax, (starts[0], unembed))
    else:
        chunks = unembed.reshape(-1, count, width).swapaxes(0, 1)
        softmax, _ = jax.lax.scan(jax.checkpoint(add_chunk), softmax, (starts, chunks))
    largest = pmax(softmax.largest, mesh, TENSOR)
    total = psum_forward(softmax.total * jnp.exp(softmax.largest - largest), mesh, TENSOR)
    picked = psum_forward(softmax.target, mesh, TENSOR)
    return Scores(largest + jnp.log(total) - picked, picked >= largest)


def _count_chunks(positions: int, tokens: int) -> int:
    """Returns the smallest number of equal chunks of at most `MAX_LOGITS` logits."""
    return next(
        n for n in range(1, tokens + 1) if tokens % n == 0 and (positions * tokens // n <= MAX_LOGITS or n == tokens)
    )


@jax.custom_vjp
def _products(hidden: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns `hidden @ columns` in float32.

    The gradient is cast to the dtype of `hidden` first: otherwise the products of the adjoint would be slow float32
    products.
    """
    return jnp.matmul(hidden, columns, preferred_element_type=jnp.float32)


def _products_fwd(hidden, columns):
    return _products(hidden, columns), (hidden, columns)


def _products_bwd(residuals, grad):
    hidden, columns = residuals
    grad = jax.lax.optimization_barrier(grad.astype(hidden.dtype))
    return grad @ columns.T, hidden.T @ grad


_products.defvjp(_products_fwd, _products_bwd)
