"""The experts of one device over the tokens that are on the device.

Axes: N tokens, D model width, E experts of this device, K experts per token. Called by the transports.

A choice is a pair of a token and one of its experts. Many tokens are sorted by expert and computed in blocks. For few
tokens it is faster to compute one choice after the other.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxtml.model.experts.dispatch import block_rows, buffer_rows, combine, dispatch, plan_buffer
from jaxtml.model.experts.grouped import grouped_swiglu
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.placement import Placement


def apply_local_experts(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: ExpertWeights, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Applies this device's experts.

    Args:
      x: `[N, D]`.
      index: `[N, K]`, the experts of each token, numbered over all devices.
      weight: `[N, K]`, the weights of these experts.
      experts: of this device.
      placement: the mesh, and the capacity of the buffer.

    Returns:
      The weighted sum over this device's experts, `[N, D]`, and the choices for which there was no room, int32.
    """
    mesh = placement.mesh
    if mesh.expert > 1:
        index = index - experts.count * jax.lax.axis_index("expert")
    n, k = index.shape
    # Choice by choice, decoding reads K experts per token. From about two rows per expert on, sorted blocks read less.
    if n * k >= 2 * experts.count * mesh.expert:
        return apply_sorted(x, index, weight, experts, placement)
    # A kernel that reads experts in place reads each expert only once, however few the tokens are.
    tpu = partial(apply_sorted, placement=placement) if experts.in_place else apply_one_by_one
    cuda = partial(apply_sorted, placement=placement) if experts.in_place_on_gpu else apply_one_by_one
    return jax.lax.platform_dependent(x, index, weight, experts, tpu=tpu, cuda=cuda, default=apply_one_by_one)


def apply_sorted(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: ExpertWeights, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Does the same as `apply_local_experts`, with rows sorted by expert in padded blocks.

    `index` numbers this device's experts from 0.
    """
    (n, k), devices = index.shape, placement.mesh.expert
    block = block_rows(n * k // devices, experts.count)
    rows = buffer_rows(n * k, devices, experts.count, block, placement.capacity)
    plan = plan_buffer(index, experts.count, block, rows)
    mean = -(-n * k // devices)  # choices of a device when the load is even
    # If there are few choices, each choice has a block of its own.
    expected = min(rows, mean * block, mean + experts.count * block // 2)
    done = grouped_swiglu(dispatch(x, plan.source, plan.slot), plan.groups, experts, block, expected)
    return combine(done, weight, plan.slot, plan.source), plan.dropped


def apply_one_by_one(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """Does the same as `apply_local_experts`, one choice after the other. Drops nothing.

    `index` numbers this device's experts from 0. Each choice is a vector-matrix product, which reads the weights of its
    expert in place. One gather for all choices would write a copy of these weights, and a CPU would then transpose the
    copy. With the config `tiny`, one token would take ten times as long.
    """
    n, k = index.shape

    def multiply(row: jax.Array, weights: jax.Array, scale: jax.Array | None, *place: jax.Array | int) -> jax.Array:
        product = row @ weights[(*experts.layer_index, *place)].astype(row.dtype)
        return product if scale is None else (product * scale[(*experts.layer_index, *place)]).astype(row.dtype)

    def apply_choice(_: None, choice: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        token, expert = choice

        def run() -> jax.Array:
            gate, up = (multiply(token[None], experts.w13, experts.scale13, expert, half) for half in (0, 1))
            return multiply(jax.nn.silu(gate) * up, experts.w2, experts.scale2, expert)[0]

        here = (expert >= 0) & (expert < experts.count)
        return None, jax.lax.cond(here, run, lambda: jnp.zeros_like(token))

    _, outs = jax.lax.scan(apply_choice, None, (jnp.repeat(x, k, axis=0), index.reshape(-1)))
    return jnp.einsum("nkd,nk->nd", outs.reshape(n, k, -1), weight), jnp.zeros((), jnp.int32)
