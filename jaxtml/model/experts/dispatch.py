"""Tokens into a buffer that is sorted by expert, and back. Called by `local` and the transports."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def block_rows(rows: int, experts: int) -> int:
    """Block height: a quarter of the mean rows per expert, a power of two in 8..128."""
    target = max(8, min(128, rows // (4 * experts)))
    return 1 << (target.bit_length() - 1)


def buffer_rows(choices: int, devices: int, experts: int, block: int, capacity: float | None) -> int:
    """Rows of a device's buffer for `choices` of `devices` devices, the padding of its experts' blocks included: for
    the worst case, or `capacity` times the mean and at least a block for each expert."""
    worst = (choices // block + experts) * block
    if capacity is None:
        return worst
    room = -(-round(capacity * choices / devices) // block) * block
    return min(worst, max(room, experts * block))


def plan_buffer(index: jax.Array, experts: int, block: int, rows: int) -> tuple[jax.Array, ...]:
    """Where each (token, choice) goes; an index outside `[0, experts)` belongs to another device.

    Returns `slot` `[N, K]` (its row in the padded buffer; R where it has none), `source` `[R]` (which flat choice a row
    holds, N K where it is padding), the groups' padded sizes `[experts]`, and how many choices found no room.
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
    return slot.reshape(index.shape), source, groups, (here & ~fits).sum(dtype=jnp.int32)


@jax.custom_vjp
def dispatch(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """`x` `[N, D]` -> rows `[R, D]`, zero where a row is padding. The adjoint is a gather too, never a scatter."""
    k = slot.shape[1]
    return x.at[source // k].get(mode="fill", fill_value=0)


def _dispatch_fwd(x, source, slot):
    return dispatch(x, source, slot), slot


def _dispatch_bwd(slot, grad):
    return grad.at[slot].get(mode="fill", fill_value=0).sum(axis=1), None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows: jax.Array, weight: jax.Array, slot: jax.Array, source: jax.Array) -> jax.Array:
    """Rows `[R, D]` back to tokens: `sum_k weight[n, k] rows[slot[n, k]]`; a slot outside the buffer gives nothing."""
    del source
    return jnp.einsum("nkd,nk->nd", rows.at[slot].get(mode="fill", fill_value=0), weight)


def _combine_fwd(rows, weight, slot, source):
    return combine(rows, weight, slot, source), (rows, weight, slot, source)


def _combine_bwd(saved, grad):
    rows, weight, slot, source = saved
    k = slot.shape[1]
    scale = weight.reshape(-1).at[source].get(mode="fill", fill_value=0)
    drows = grad.at[source // k].get(mode="fill", fill_value=0) * scale[:, None]
    dweight = jnp.einsum("nkd,nd->nk", rows.at[slot].get(mode="fill", fill_value=0), grad)
    return drows, dweight, None, None


combine.defvjp(_combine_fwd, _combine_bwd)
