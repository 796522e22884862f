"""Cross-entropy over the vocabulary without the logits of all of it: a chunk of columns after the other.

Axes: N positions, D model width, V words of this device, C words of a chunk. 4,096 positions have 3.3 GB of float32
logits over Inkling's vocabulary, and their gradient as much. Chunks of columns, not of positions, make each column's
gradient in one piece, and a chunk's weights are fetched when its turn comes. Called by `interaction` in training.
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

MAX_LOGITS = 2**27  # of a chunk, at most: half a gigabyte in float32


class Scores(NamedTuple):
    """How well each target was foreseen: `nll` `[N]` float32 in nats, `right` `[N]` bool (no word is likelier)."""

    nll: jax.Array
    right: jax.Array


class _Seen(NamedTuple):
    """Of the chunks so far, `[N]` float32 each: the largest logit, the sum of exp(logit - largest), the target's."""

    largest: jax.Array
    total: jax.Array
    picked: jax.Array


def score_targets(
    hidden: jax.Array,
    unembed: jax.Array,
    target: jax.Array,
    mesh: MeshShape,
    fetched: Callable[[jax.Array], jax.Array] = lambda columns: columns,
) -> Scores:
    """Scores `target` `[N]` int32 from `hidden` `[N, D]`, logits being `hidden @ unembed`.

    Args:
      hidden: the same on all devices of `tensor`.
      unembed: `[D or a part of it, V]`, this device's words: the first after those of devices before it on `tensor`.
      target: in the numbering of all words.
      mesh: where it runs.
      fetched: some columns as they are held -> `[D, C]` in the dtype of `hidden`.
    """
    count = _chunks(len(hidden), unembed.shape[1])
    width = unembed.shape[1] // count
    first = unembed.shape[1] * jax.lax.axis_index("tensor") if mesh.tensor > 1 else 0
    hidden = psum_backward(hidden, mesh, TENSOR)

    def one(seen: _Seen, chunk: tuple[jax.Array, jax.Array]) -> tuple[_Seen, None]:
        start, columns = chunk
        logits = _products(hidden, fetched(columns))
        at = target - start
        own = jnp.take_along_axis(logits, jnp.clip(at, 0, width - 1)[:, None], axis=1)[:, 0]
        most = jax.lax.stop_gradient(jnp.maximum(seen.largest, logits.max(axis=1)))
        total = seen.total * jnp.exp(seen.largest - most) + jnp.exp(logits - most[:, None]).sum(axis=1)
        return _Seen(most, total, seen.picked + jnp.where((at >= 0) & (at < width), own, 0)), None

    nothing = jnp.zeros(target.shape, jnp.float32)
    seen = _Seen(nothing + MASKED_LOGIT, nothing, nothing)
    starts = first + width * jnp.arange(count)
    if count == 1:
        seen, _ = one(seen, (starts[0], unembed))
    else:
        parts = unembed.reshape(-1, count, width).swapaxes(0, 1)
        seen, _ = jax.lax.scan(jax.checkpoint(one), seen, (starts, parts))
    most = pmax(seen.largest, mesh, TENSOR)
    total = psum_forward(seen.total * jnp.exp(seen.largest - most), mesh, TENSOR)
    picked = psum_forward(seen.picked, mesh, TENSOR)
    return Scores(most + jnp.log(total) - picked, picked >= most)


def _chunks(positions: int, words: int) -> int:
    """The fewest chunks of equal width that keep within `MAX_LOGITS`."""
    return next(
        n for n in range(1, words + 1) if words % n == 0 and (positions * words // n <= MAX_LOGITS or n == words)
    )


@jax.custom_vjp
def _products(hidden: jax.Array, columns: jax.Array) -> jax.Array:
    """`hidden @ columns` in float32; gradients in the dtype of `hidden`, or the products of the adjoint would be slow
    ones of float32."""
    return jnp.matmul(hidden, columns, preferred_element_type=jnp.float32)


def _products_fwd(hidden, columns):
    return _products(hidden, columns), (hidden, columns)


def _products_bwd(saved, grad):
    hidden, columns = saved
    grad = jax.lax.optimization_barrier(grad.astype(hidden.dtype))
    return grad @ columns.T, hidden.T @ grad


_products.defvjp(_products_fwd, _products_bwd)
