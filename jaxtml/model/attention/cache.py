"""Attention that continues sessions: keys and values of the past in ring buffers.

Axes: B batch, T tokens of this call, G key/value heads, Q query heads of a group, K head width, R width of the relative
state, E relative extent, S slots of the ring buffer. Called by `attention` and `backbone`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import AttentionConfig
from jaxtml.model.numerics import MASKED_LOGIT

MAX_LOGITS = 2**26  # of a call that continues sessions, at a time: a quarter of a gigabyte


class KVCache(NamedTuple):
    """Keys and values of a batch of sessions, of one layer or of a stack of layers.

    Keys are stored transposed, `[*stack, B, G, K, S]`, values `[*stack, B, G, S, K]`: both decode matmuls then read
    rows that lie together. Slots `[0, pinned)` hold the session's first tokens for good, the rest is a ring.
    """

    k: jax.Array
    v: jax.Array


class CacheStep(NamedTuple):
    """Where the T new tokens of each session stand: shared by all layers of one kind.

    `query` `[B, T]` int32 is the new tokens' position in their session, `slots` `[B, T]` where each is written (S where
    it is padding: dropped), and `visible` `[B, T, S]` whether a query sees what a slot holds.
    """

    length: jax.Array
    query: jax.Array
    slots: jax.Array
    visible: jax.Array


def ring_slots(config: AttentionConfig, max_tokens: int) -> int:
    """Slots a ring needs so that a call of `max_tokens` never overwrites a key that one of its queries still sees."""
    return config.pinned + -(-(config.window + max_tokens - 1) // 16) * 16


def plan_cache_step(
    config: AttentionConfig, slots: int, position: jax.Array, length: jax.Array, tokens: int
) -> CacheStep:
    """Plans one call: `position` `[B]` tokens are in the cache, `length` `[B]` of `tokens` new ones are real."""
    ring = slots - config.pinned
    query = position[:, None] + jnp.arange(tokens)  # [B, T]
    real = jnp.arange(tokens) < length[:, None]
    slot = jnp.where(query < config.pinned, query, config.pinned + (query - config.pinned) % ring)
    slot = jnp.where(real, slot, slots)
    # The position that each slot holds once the new tokens are written.
    newest = position + length - 1
    index = jnp.arange(slots)
    ring_position = newest[:, None] - (newest[:, None] - index) % ring
    held = jnp.where(index < config.pinned, index, ring_position)
    held = jnp.where((held >= config.pinned) | (index < config.pinned), held, -1)
    distance = query[:, :, None] - held[:, None, :]
    seen = (distance < config.window) | (held[:, None, :] < config.pinned)
    visible = (distance >= 0) & seen & (held >= 0)[:, None, :]
    return CacheStep(length, query, slot, visible)


def write_cache(
    cache: KVCache, step: CacheStep, keys: jax.Array, values: jax.Array, at: tuple[jax.Array, ...]
) -> KVCache:
    """Puts the new keys and values `[B, T, G, K]` into their slots; padding is dropped."""
    rows = jnp.arange(keys.shape[0])[:, None]
    k = cache.k.at[(*at, rows, slice(None), slice(None), step.slots)].set(keys.astype(cache.k.dtype), mode="drop")
    v = cache.v.at[(*at, rows, slice(None), step.slots)].set(values.astype(cache.v.dtype), mode="drop")
    return KVCache(k, v)


def attend_cache(
    config: AttentionConfig, query: jax.Array, cache: KVCache, rel: jax.Array, proj: jax.Array, step: CacheStep
) -> jax.Array:
    """Attention of T new tokens over the ring of one layer: `query` `[B, T, G, Q, K]`, `rel` `[B, T, G, Q, R]`.

    A part of the queries after the other where all would have more than `MAX_LOGITS` logits.
    """
    batch, tokens, groups, per_group, width = query.shape
    slots = cache.k.shape[-1]
    dtype = query.dtype

    def some(query: jax.Array, rel: jax.Array, position: jax.Array, visible: jax.Array) -> jax.Array:
        t = query.shape[1]
        flat = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * t, width)
        logits = jnp.matmul(flat, cache.k.astype(dtype), preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, groups, per_group, t, slots)
        bias = ring_bias(rel @ proj, position, config.pinned, slots).transpose(0, 2, 3, 1, 4)
        logits = jnp.where(visible[:, None, None], logits + bias, MASKED_LOGIT)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype).reshape(*flat.shape[:3], slots)
        out = (weights @ cache.v.astype(dtype)).reshape(batch, groups, per_group, t, width)
        return out.transpose(0, 3, 1, 2, 4)

    given = (query, rel, step.query, step.visible)
    part = max(1, MAX_LOGITS // (batch * groups * per_group * slots))
    if tokens <= part:
        return some(*given)
    count = -(-tokens // part)
    part = -(-tokens // count)

    def cut(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [count, B, part, ...]
        a = jnp.pad(a, [(0, 0), (0, count * part - tokens)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, count, part, *a.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda parts: some(*parts), tuple(cut(a) for a in given))
    return out.swapaxes(0, 1).reshape(batch, count * part, *out.shape[3:])[:, :tokens]


def ring_bias(profile: jax.Array, position: jax.Array, pinned: int, slots: int) -> jax.Array:
    """`profile` `[B, T, G, Q, E]`, each query's bias by distance, as `[B, T, G, Q, S]`, by slot.

    Backwards and repeated round the ring, a query's profile is one line of which its position says where to begin: to
    cut it out is to copy a stretch of memory, where to look up every slot's distance is to gather number by number.
    Slots that hold another round's token get a bias too: nobody sees them.
    """
    ring, extent = slots - pinned, profile.shape[-1]
    kept = min(extent, ring)
    nothing = jnp.zeros((*profile.shape[:-1], ring - kept), profile.dtype)
    line = jnp.concatenate([profile[..., :1], nothing, profile[..., kept - 1 : 0 : -1]], axis=-1)
    line = jnp.concatenate([line, line], axis=-1)
    start = ring - (position - pinned) % ring
    turned = jax.vmap(jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, ring, axis=-1)))(line, start)
    if not pinned:
        return turned
    distance = (position[..., None] - jnp.arange(pinned))[:, :, None, None]
    index = jnp.broadcast_to(jnp.clip(distance, 0, extent - 1), (*profile.shape[:-1], pinned))
    near = jnp.where(distance < extent, jnp.take_along_axis(profile, index, axis=-1), 0)
    return jnp.concatenate([near, turned], axis=-1)
