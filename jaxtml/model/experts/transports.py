"""The three ways in which tokens reach their experts where the experts live on several devices.

Axes: N tokens of this device, D model width, K experts per token, E routed experts, P devices of the mesh axis
`expert`, L = E / P experts of a device, R rows of a device's buffer. A choice is a pair of a token and one of its
experts. Called by `moe`.

- `replicated`: all devices have the same tokens, each applies its own experts, and the results are summed. For serving.
- `ring`: each device gathers the tokens of all devices, and the results are scattered back. It runs everywhere.
- `ragged`: each token travels only to the devices of its experts (`ragged_all_to_all`, which a CPU does not have).

All three have one signature, `ExpertTransport`. They return parts of a sum: the experts' width is split over `tensor`,
and with `replicated` the experts themselves over `expert`. `moe` adds the shared experts' part before it sums over the
axes of `SUMMED`, so routed and shared experts are summed by one collective.

Nothing is dropped unless `Placement.capacity` bounds the buffer. Then the rows that do not fit are dropped, those of
the last expert first, and counted.
"""

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
from jaxtml.parallel.collectives import all_gather, reduce_scatter

# (tokens `[N, D]`, routing, this device's experts, placement) -> (parts of tokens `[N, D]`, dropped choices int32)
# Gradients of the tokens and of the routing's weights are those of this device's part, too.
ExpertTransport = Callable[[jax.Array, Routing, ExpertWeights, Placement], tuple[jax.Array, jax.Array]]


def replicated(
    x: jax.Array, routing: Routing, experts: ExpertWeights, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Applies the experts where all devices of `expert` have the same tokens.

    Returns this device's part of `[N, D]`, and the dropped choices of this device's experts.
    """
    return apply_local_experts(x, routing.index, routing.weight, experts, placement)


def ring(x: jax.Array, routing: Routing, experts: ExpertWeights, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """Gathers the tokens of all devices, applies the experts and scatters the results back.

    A token's traffic is (P - 1) D numbers. With `ragged` it is about min(P, K) D, so `ring` is as good where K is near
    P.

    Returns this device's part of `[N, D]`, and the dropped choices of this device's experts.
    """
    if placement.mesh.expert == 1:
        return apply_local_experts(x, routing.index, routing.weight, experts, placement)
    index, weight = _all_gather_choices(routing.index, routing.weight)
    out, dropped = apply_local_experts(all_gather(x, ("expert",), 0), index, weight, experts, placement)
    return reduce_scatter(out, ("expert",), 0), dropped


def ragged(x: jax.Array, routing: Routing, experts: ExpertWeights, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """Sends each row to the device of its expert and back.

    Rows are sorted by expert, so the rows for one device lie together, and among them the rows for each of its experts.
    A device sends the rows for each expert as one piece. In the receiving buffer, the pieces of all devices for the
    same expert stand side by side. So nothing is sorted a second time.

    Returns this device's part of `[N, D]`, and the dropped choices of this device's tokens.
    """
    mesh = placement.mesh
    if mesh.expert == 1:
        return ring(x, routing, experts, placement)
    n, k = routing.index.shape
    block = block_rows(n * k, experts.count)
    rows = buffer_rows(n * k * mesh.expert, mesh.expert, experts.count, block, placement.capacity)
    device = jax.lax.axis_index("expert")
    order, counts = sort_by_expert(routing.index, experts.count * mesh.expert)
    plan = plan_exchange(jax.lax.all_gather(counts, "expert"), device, rows, block)
    slot = jnp.argsort(order).reshape(n, k)
    outgoing = dispatch(x, order, slot)
    arrived = jax.lax.ragged_all_to_all(
        outgoing,
        _opaque_zeros(outgoing, rows),
        plan.send_from,
        plan.sent,
        plan.send_to,
        plan.received,
        axis_name="expert",
    )
    done = grouped_swiglu(arrived, plan.groups, experts, block)
    returned = jax.lax.ragged_all_to_all(
        done,
        _opaque_zeros(outgoing, n * k),
        plan.return_from,
        plan.received,
        plan.return_to,
        plan.sent,
        axis_name="expert",
    )
    out = combine(returned, routing.weight, slot, order)
    return out, (counts.sum() - plan.sent.sum()).astype(jnp.int32)


TRANSPORTS: dict[str, ExpertTransport] = {"replicated": replicated, "ring": ring, "ragged": ragged}
# The mesh axes over which the caller must sum the result of a transport.
SUMMED: dict[str, tuple[str, ...]] = {"replicated": ("expert", "tensor"), "ring": TENSOR, "ragged": TENSOR}


@jax.custom_vjp
def _all_gather_choices(index: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gathers the experts of each token and their weights over `expert` with one all_gather: `[N, K]` -> `[P N, K]`.

    Both travel as unsigned integers of the weights' width. An index that is converted to a float may be rounded, and
    one whose bits are taken for a float may be a NaN, of which not every operation keeps the bits.
    """
    kind = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(weight, kind)
    gathered = jax.lax.all_gather(jnp.concatenate([index.astype(kind), bits], axis=1), "expert", axis=0, tiled=True)
    index_bits, bits = jnp.split(gathered, 2, axis=1)
    return index_bits.astype(index.dtype), jax.lax.bitcast_convert_type(bits, weight.dtype)


_all_gather_choices.defvjp(
    lambda index, weight: (_all_gather_choices(index, weight), None),
    lambda _, grads: (None, reduce_scatter(grads[1], ("expert",), 0)),
)


def _opaque_zeros(like: jax.Array, rows: int) -> jax.Array:
    """Returns zeros `[rows, D]` that XLA cannot fold: a constant would be kept in memory and copied once per layer.

    No gradient passes, because the gradient of rows that no device fills may be anything.
    """
    return jnp.broadcast_to(jax.lax.stop_gradient(like[:1]) * 0, (rows, like.shape[1]))


class ExchangePlan(NamedTuple):
    """The offsets and sizes of both `ragged_all_to_all` of one device, and the groups of rows that arrive.

    Attributes:
      send_from: `[E]`, for each expert, where its rows begin among this device's sorted rows.
      sent: `[E]`, for each expert, how many rows are sent.
      send_to: `[E]`, for each expert, where its rows begin in the buffer of the expert's device.
      received: `[P L]`, for each device and own expert, how many rows arrive.
      return_from: `[P L]`, for each device and own expert, where these rows begin in this device's buffer.
      return_to: `[P L]`, for each device and own expert, where the rows begin among that device's sorted rows.
      groups: `[L]`, the rows of each own expert in the buffer, padding included.
    """

    send_from: jax.Array
    sent: jax.Array
    send_to: jax.Array
    received: jax.Array
    return_from: jax.Array
    return_to: jax.Array
    groups: jax.Array


def plan_exchange(counts: jax.Array, device: jax.Array, rows: int, block: int) -> ExchangePlan:
    """Plans one device's part of the exchange. The parts of all devices fit together, because `counts` is the same.

    Args:
      counts: `[P, E]`, the rows that each device has for each expert.
      device: the index of this device.
      rows: R, the room in the buffer of each device; rows that do not fit are not sent, those of the last expert first.
      block: the rows of each expert are padded to a multiple of this number.
    """
    devices, experts = counts.shape
    local = experts // devices
    by_owner = counts.reshape(devices, devices, local)  # [from, to, expert]
    wanted = by_owner.sum(axis=0)  # [to, expert]
    padded = (wanted + block - 1) // block * block
    start = jnp.cumsum(padded, axis=1) - padded
    room = jnp.clip(rows - start, 0, padded)
    before = jnp.cumsum(by_owner, axis=0) - by_owner  # rows that earlier devices have for the same expert
    kept = jnp.clip(room[None] - before, 0, by_owner)
    in_buffer = start[None] + before
    in_sorted = (jnp.cumsum(counts, axis=1) - counts).reshape(devices, devices, local)
    return ExchangePlan(
        send_from=in_sorted[device].reshape(-1),
        sent=kept[device].reshape(-1),
        send_to=in_buffer[device].reshape(-1),
        received=kept[:, device].reshape(-1),
        return_from=in_buffer[:, device].reshape(-1),
        return_to=in_sorted[:, device].reshape(-1),
        groups=room[device] // block * block,
    )


def sort_by_expert(index: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Sorts the choices `index` `[N, K]` by expert.

    Returns the numbers of the choices in that order, `[N K]`, and how many choices each expert has, `[experts]`.
    """
    flat = index.reshape(-1)
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=experts)
