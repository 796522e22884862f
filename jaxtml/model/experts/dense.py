"""The oracle of the mixture of experts: every expert on every token. Called by tests only.

Axes: N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtml.model.experts.routing import Routing
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.layers import swiglu


def dense_experts(x: jax.Array, routing: Routing, experts: ExpertWeights) -> jax.Array:
    """Runs every expert on every token and returns the weighted sum of the chosen ones: `[N, D]` -> `[N, D]`."""
    w13, w2 = experts.layer(x.dtype)
    outs = jax.vmap(lambda a, b: swiglu(x, a.swapaxes(0, 1), b))(w13, w2)  # [E, N, D]
    mix = jnp.zeros((x.shape[0], experts.count), x.dtype)
    mix = mix.at[jnp.arange(x.shape[0])[:, None], routing.index].add(routing.weight)
    return jnp.einsum("ne,end->nd", mix, outs)
