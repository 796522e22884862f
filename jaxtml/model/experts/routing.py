"""The router's decision: which experts a token goes to and with what weights, and what a layer reports of it.

Axes: N tokens of this device, D model width, E routed experts, S shared experts, K experts per token, M modalities (the
number of `PositionKind`s). A choice is a pair of a token and one of its experts. Called by `moe`; the transports read a
`Routing`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import BackboneConfig
from jaxtml.stream.tokens import PositionKind

MODALITIES = len(PositionKind)


class Routing(NamedTuple):
    """One routing decision.

    Attributes:
      index: `[N, K]` int32, the experts of each token; an index outside `[0, E)` stands for no expert.
      weight: `[N, K]`, the weights of these experts.
      shared: `[N, S]`, the weights of the shared experts.
      logits: `[N, E]` float32, the router's logits.
    """

    index: jax.Array
    weight: jax.Array
    shared: jax.Array
    logits: jax.Array


class MoEStats(NamedTuple):
    """What a layer reports of the tokens of this device.

    Attributes:
      load: `[M, E]` float32, how many tokens of each modality chose each expert; padding is left out.
      dropped: int32, the choices for which the buffer had no room.
      z_loss: float32, the router's z-loss, summed over tokens; padding is left out.
    """

    load: jax.Array
    dropped: jax.Array
    z_loss: jax.Array


def route(x: jax.Array, router: jax.Array, bias: jax.Array, global_scale: jax.Array, config: BackboneConfig) -> Routing:
    """Chooses the K experts of each token with the highest score plus bias; computed in float32.

    The correction bias selects experts but does not weigh them. The weights of routed and shared experts are normalised
    together.

    Args:
      x: `[N, D]`.
      router: `[D, E + S]`.
      bias: `[E]`, the correction bias; no gradient passes.
      global_scale: `[1]`, the learned scale of all weights.
      config: E, S, K and the fixed scale of all weights.
    """
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
    routed, shared = logits[:, : config.n_experts], logits[:, config.n_experts :]
    score = jax.lax.stop_gradient(jax.nn.sigmoid(routed) + bias.astype(jnp.float32))
    _, index = jax.lax.top_k(score, config.experts_per_token)
    picked = jnp.concatenate([jnp.take_along_axis(routed, index, axis=1), shared], axis=1)
    # A softmax of log-sigmoids gives the sigmoids divided by their sum, without underflow.
    weight = jax.nn.softmax(jax.nn.log_sigmoid(picked), axis=1)
    weight = weight * (config.route_scale * global_scale.astype(jnp.float32))
    k = config.experts_per_token
    return Routing(index, weight[:, :k].astype(x.dtype), weight[:, k:].astype(x.dtype), routed)


def collect_stats(routing: Routing, modality: jax.Array, dropped: jax.Array) -> MoEStats:
    """Returns the stats of one layer.

    Args:
      routing: the decision.
      modality: `[N]` int32, the `PositionKind` of each token.
      dropped: int32, the choices for which the buffer had no room.
    """
    present = (modality != PositionKind.PAD).astype(jnp.float32)
    chosen = jax.nn.one_hot(routing.index, routing.logits.shape[1], dtype=jnp.float32).sum(axis=1)
    lse = jax.nn.logsumexp(routing.logits, axis=-1)
    return MoEStats(
        load=(jax.nn.one_hot(modality, MODALITIES) * present[:, None]).T @ chosen,
        dropped=dropped,
        z_loss=(lse * lse * present).sum(),
    )
