"""Copies tokens into a buffer that is sorted by expert, and combines the rows of the buffer into tokens again.

Axes: N tokens, D model width, K experts per token, E experts of this device, R rows of the buffer. A choice is a pair
of a token and one of its experts; the N K choices are numbered in the order of `[N, K]`. Called by `local` and
`transports`.

The buffer has the rows of expert 0, then those of expert 1, and so on. The rows of each expert are padded to a multiple
of `block`, so that every block of rows belongs to one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


def block_rows(rows: int, experts: int) -> int:
    """Returns the rows of a block: a quarter of the mean rows per expert, as a power of two from 8 to 128."""
    target = max(8, min(128, rows // (4 * experts)))
    return 1 << (target.bit_length() - 1)


def buffer_rows(choices: int, devices: int, experts: int, block: int, capacity: float | None) -> int:
    """Returns R, the rows of a device's buffer, the padding of the experts' blocks included.

    Args:
      choices: the choices of all `devices`.
      devices: how many devices share the experts.
      experts: E, the experts of one device.
      block: the rows of each expert are padded to a multiple of this number.
      capacity: the room in the buffer, as a multiple of the mean number of choices per device. The buffer has room for
        at least one block of each expert. None: room for the worst case.
    """
    worst = (choices // block + experts) * block
    if capacity is None:
        return worst
    room = -(-round(capacity * choices / devices) // block) * block
    return min(worst, max(room, experts * block))


class BufferPlan(NamedTuple):
    """Where each choice goes in the buffer.

    Attributes:
      slot: `[N, K]` int32, the row of each choice; R where it has none.
      source: `[R]` int32, the choice in each row; N K where the row is padding.
      groups: `[E]` int32, the rows of each expert, padding included.
      dropped: int32, the choices of this device's experts for which there was no room.
    """

    slot: jax.Array
    source: jax.Array
    groups: jax.Array
    dropped: jax.Array


def plan_buffer(index: jax.Array, experts: int, block: int, rows: int) -> BufferPlan:
    """Plans the buffer of one device.

    Args:
      index: `[N, K]`, the experts of each token; an index outside `[0, experts)` belongs to another device.
      experts: E.
      block: the rows of each expert are padded to a multiple of this number.
      rows: R; choices that do not fit are dropped, those of the last expert first.
    """
    flat = index.reshape(-1)
    here = (flat >= 0) & (flat < experts)
    onehot = jax.nn.one_hot(flat, experts, dtype=jnp.int32)  # zero for choices of other devices
    expert = jnp.clip(flat, 0, experts - 1)
    rank = jnp.take_along_axis(jnp.cumsum(onehot, axis=0) - onehot, expert[:, None], axis=1)[:, 0]
    padded = (onehot.sum(axis=0) + block - 1) // block * block
    start = jnp.cumsum(padded) - padded
    slot = start[expert] + rank
    fits = here & (slot < rows)
    slot = jnp.where(fits, slot, rows)
    choices = jnp.arange(flat.shape[0], dtype=jnp.int32)
    source = jnp.full((rows,), flat.shape[0], jnp.int32).at[slot].set(choices, mode="drop")
    groups = jnp.clip(rows - start, 0, padded) // block * block
    return BufferPlan(slot.reshape(index.shape), source, groups, (here & ~fits).sum(dtype=jnp.int32))


@jax.custom_vjp
def dispatch(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """Copies tokens `x` `[N, D]` into the rows of the buffer, `[R, D]`; padding is zero.

    The adjoint is a gather too, by `slot`, and never a scatter.
    """
    k = slot.shape[1]
    return x.at[source // k].get(mode="fill", fill_value=0)


def _dispatch_fwd(x, source, slot):
    return dispatch(x, source, slot), slot


def _dispatch_bwd(slot, grad):
    return grad.at[slot].get(mode="fill", fill_value=0).sum(axis=1), None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows: jax.Array, weight: jax.Array, slot: jax.Array, source: jax.Array) -> jax.Array:
    """Returns tokens `[N, D]` from rows `[R, D]`: `sum_k weight[n, k] rows[slot[n, k]]`.

    A slot outside the buffer contributes nothing. The adjoint is a gather too, by `source`.
    """
    del source
    return jnp.einsum("nkd,nk->nd", rows.at[slot].get(mode="fill", fill_value=0), weight)


def _combine_fwd(rows, weight, slot, source):
    return combine(rows, weight, slot, source), (rows, weight, slot, source)


def _combine_bwd(residuals, grad):
    rows, weight, slot, source = residuals
    k = slot.shape[1]
    scale = weight.reshape(-1).at[source].get(mode="fill", fill_value=0)
    drows = grad.at[source // k].get(mode="fill", fill_value=0) * scale[:, None]
    dweight = jnp.einsum("nkd,nd->nk", rows.at[slot].get(mode="fill", fill_value=0), grad)
    return drows, dweight, None, None


combine.defvjp(_combine_fwd, _combine_bwd)
