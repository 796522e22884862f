"""Which experts a token goes to, and what a layer reports of it. Called by `moe` and the transports."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxtml.stream.tokens import PositionKind

MODALITIES = len(PositionKind)


class Routing(NamedTuple):
    """One routing decision. `index` and `weight` are `[N, K]`, `shared` `[N, S]`, `logits` `[N, E]` float32."""

    index: jax.Array
    weight: jax.Array
    shared: jax.Array
    logits: jax.Array


class MoEStats(NamedTuple):
    """What a layer reports of this device's tokens: choices per modality and expert `[M, E]` (padding left out), those
    that found no room (int32), and the router's z-loss, summed over tokens."""

    load: jax.Array
    dropped: jax.Array
    z_loss: jax.Array
