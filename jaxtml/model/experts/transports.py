"""How tokens reach their experts where these live on several devices. Called by `moe`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.experts.dispatch import block_rows, buffer_rows, combine, dispatch
from jaxtml.model.experts.grouped import grouped_swiglu
from jaxtml.model.experts.local import apply_local_experts
from jaxtml.model.experts.routing import Routing
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.placement import TENSOR, Placement
from jaxtml.parallel.collectives import all_gather, psum, psum_backward, psum_forward, reduce_scatter

ExpertTransport = Callable[[jax.Array, Routing, ExpertWeights, Placement], tuple[jax.Array, jax.Array]]


def replicated(
    x: jax.Array, routing: Routing, experts: ExpertWeights, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """All devices of `expert` have the same tokens `x` `[N, D]`; each adds what its L experts give.

    Returns `[N, D]`, the same on all of them, and the dropped choices of all.
    """
    axes = ("expert", "tensor")
    x, weight = (psum_backward(a, placement.mesh, axes) for a in (x, routing.weight))
    out, dropped = apply_local_experts(x, routing.index, weight, experts, placement)
    return psum_forward(out, placement.mesh, axes), psum(dropped, placement.mesh, ("expert",))


def ring(x: jax.Array, routing: Routing, experts: ExpertWeights, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """Tokens of all devices are gathered, results scattered back to theirs: `[N, D]` and this device's dropped choices.

    The traffic is (P - 1) x D per token, against about min(P, K) x D of `ragged`: as good where K is near P.
    """
    mesh = placement.mesh
    x, weight, index = (psum_backward(x, mesh, TENSOR), psum_backward(routing.weight, mesh, TENSOR), routing.index)
    if mesh.expert > 1:
        x, weight = (all_gather(a, ("expert",), 0) for a in (x, weight))
        index = jax.lax.all_gather(index, "expert", axis=0, tiled=True)
    out, dropped = apply_local_experts(x, index, weight, experts, placement)
    if mesh.expert > 1:
        out = reduce_scatter(out, ("expert",), 0)
    return psum_forward(out, mesh, TENSOR), dropped


def ragged(x: jax.Array, routing: Routing, experts: ExpertWeights, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """Rows travel to the devices of their experts and back: `[N, D]` and this device's dropped choices.

    Sorted by expert, the rows for one device lie together, those for one of its experts too: one update per expert
    brings them where that expert's rows of all devices stand side by side, and nothing is sorted a second time.
    """
    mesh = placement.mesh
    if mesh.expert == 1:
        return ring(x, routing, experts, placement)
    n, k = routing.index.shape
    own = experts.count
    block = block_rows(n * k, own)
    rows = buffer_rows(n * k * mesh.expert, mesh.expert, own, block, placement.capacity)
    me = jax.lax.axis_index("expert")
    order, counts = sort_by_expert(routing.index, own * mesh.expert)
    trip = plan_exchange(jax.lax.all_gather(counts, "expert"), me, rows, block)
    x = psum_backward(x, mesh, TENSOR)
    slot = jnp.argsort(order).reshape(n, k)
    sent = dispatch(x, order, slot)
    arrived = jax.lax.ragged_all_to_all(
        sent, _opaque_zeros(sent, rows), trip.send_from, trip.sent, trip.to, trip.received, axis_name="expert"
    )
    done = grouped_swiglu(arrived, trip.groups, experts, block)
    back = jax.lax.ragged_all_to_all(
        done, _opaque_zeros(sent, n * k), trip.return_from, trip.received, trip.return_to, trip.sent, axis_name="expert"
    )
    out = combine(back, psum_backward(routing.weight, mesh, TENSOR), slot, order)
    return psum_forward(out, mesh, TENSOR), (counts.sum() - trip.sent.sum()).astype(jnp.int32)


TRANSPORTS: dict[str, ExpertTransport] = {"replicated": replicated, "ring": ring, "ragged": ragged}


def _opaque_zeros(like: jax.Array, rows: int) -> jax.Array:
    """Zeros `[rows, D]` that XLA cannot see through: a constant would be kept and copied once per layer.

    No gradient passes: that of rows which nobody fills may be anything.
    """
    return jnp.broadcast_to(jax.lax.stop_gradient(like[:1]) * 0, (rows, like.shape[1]))


class ExchangePlan(NamedTuple):
    """The offsets and sizes of the two `ragged_all_to_all` of one device, and the groups that arrive there.

    `send_from`, `sent`, `to` `[E]`, by expert: where its rows stand here, how many go, and where they arrive.
    `received`, `return_from`, `return_to` `[P L]`, by device and own expert: how many come from there, where they stand
    in the buffer, and where they belong when they go home. `groups` `[L]`: rows of each own expert, padding included.
    """

    send_from: jax.Array
    sent: jax.Array
    to: jax.Array
    received: jax.Array
    return_from: jax.Array
    return_to: jax.Array
    groups: jax.Array


def plan_exchange(counts: jax.Array, me: jax.Array, rows: int, block: int) -> ExchangePlan:
    """Every device's part of the exchange from the counts `[P, E]` of all: pure, the same numbers on all devices.

    Args:
      counts: rows that each device has for each expert.
      me: the index of this device.
      rows: room in the buffer of each device; what does not fit is not sent, last expert first.
      block: what an expert's rows are padded to.
    """
    devices, experts = counts.shape
    own = experts // devices
    by_owner = counts.reshape(devices, devices, own)  # [from, to, expert]
    wanted = by_owner.sum(axis=0)  # [to, expert]
    padded = (wanted + block - 1) // block * block
    start = jnp.cumsum(padded, axis=1) - padded
    room = jnp.clip(rows - start, 0, padded)
    before = jnp.cumsum(by_owner, axis=0) - by_owner  # rows of devices before, for the same expert
    kept = jnp.clip(room[None] - before, 0, by_owner)
    place = start[None] + before
    home = (jnp.cumsum(counts, axis=1) - counts).reshape(devices, devices, own)
    return ExchangePlan(
        send_from=home[me].reshape(-1),
        sent=kept[me].reshape(-1),
        to=place[me].reshape(-1),
        received=kept[:, me].reshape(-1),
        return_from=place[:, me].reshape(-1),
        return_to=home[:, me].reshape(-1),
        groups=room[me] // block * block,
    )


def sort_by_expert(index: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The flat choices `[N K]` in the order of their experts, and how many each expert has `[E]`."""
    flat = index.reshape(-1)
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=experts)
