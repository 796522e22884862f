"""The experts of one device over the tokens that it has. Called by the transports."""

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
    """What this device's experts give to the tokens `x` `[N, D]`, weighted and summed, and the choices without room."""
    mesh = placement.mesh
    own = experts.count
    if mesh.expert > 1:
        index = index - own * jax.lax.axis_index("expert")
    n, k = index.shape
    # Decoding reads K experts per token; from about two rows an expert on, sorted blocks read less.
    if n * k >= 2 * own * mesh.expert:
        return apply_sorted(x, index, weight, experts, placement)
    # A kernel that reads an expert in place reads each but once.
    tpu = partial(apply_sorted, placement=placement) if experts.in_place else apply_one_by_one
    cuda = partial(apply_sorted, placement=placement) if experts.in_place_on_gpu else apply_one_by_one
    return jax.lax.platform_dependent(x, index, weight, experts, tpu=tpu, cuda=cuda, default=apply_one_by_one)


def apply_sorted(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: ExpertWeights, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Rows sorted by expert, in padded blocks."""
    (n, k), own, ways = index.shape, experts.count, placement.mesh.expert
    block = block_rows(n * k // ways, own)
    rows = buffer_rows(n * k, ways, own, block, placement.capacity)
    slot, source, groups, dropped = plan_buffer(index, own, block, rows)
    even = -(-n * k // ways)  # choices of a device; each in a block of its own where there are few
    expected = min(rows, even * block, even + own * block // 2)
    done = grouped_swiglu(dispatch(x, source, slot), groups, experts, block, expected)
    return combine(done, weight, slot, source), dropped


def apply_one_by_one(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """Reads the chosen experts that live here, one (token, choice) after the other: gather + gemv, for few tokens.

    An expert is multiplied where it stands. One gather of all choices writes a copy of their weights, which a CPU then
    wants transposed (ten times the time for one token of `tiny`).
    """
    n, k = index.shape

    def times(row: jax.Array, weights: jax.Array, scale: jax.Array | None, *place: jax.Array | int) -> jax.Array:
        product = row @ weights[(*experts.at, *place)].astype(row.dtype)
        return product if scale is None else (product * scale[(*experts.at, *place)]).astype(row.dtype)

    def one(_: None, choice: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        token, expert = choice

        def run() -> jax.Array:
            gate, up = (times(token[None], experts.w13, experts.scale13, expert, half) for half in (0, 1))
            return times(jax.nn.silu(gate) * up, experts.w2, experts.scale2, expert)[0]

        here = (expert >= 0) & (expert < experts.count)
        return None, jax.lax.cond(here, run, lambda: jnp.zeros_like(token))

    _, outs = jax.lax.scan(one, None, (jnp.repeat(x, k, axis=0), index.reshape(-1)))
    return jnp.einsum("nkd,nk->nd", outs.reshape(n, k, -1), weight), jnp.zeros((), jnp.int32)
