"""Attention that continues sessions: the past keys and values of each session are in ring buffers.

Axes: B session slots, T tokens of this call, G key/value heads, Q query heads per key/value head, K head width, R width
of the relative state, E relative extent, S slots of the ring buffer. Called by `attention` and `backbone`.

The first `pinned` slots keep a session's first tokens until the session ends. The slots after them are a ring: a new
token overwrites the oldest one. A query may see a slot only if `CacheStep.visible` says so. So a query never sees what
an earlier session left in a slot.

Layers that retain tokens (`retention`) have a second ring behind the first. When a micro-turn with text is complete,
its retained tokens are copied there, over the oldest ones. A micro-turn without text copies nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import AttentionConfig
from jaxtml.model.numerics import MASKED_LOGIT

NOWHERE = 2**31 - 1  # the position of a token that does not exist: after every query, so that no query sees it
MAX_LOGITS = 2**26  # logits in memory at a time: a quarter of a gigabyte in float32


class KVCache(NamedTuple):
    """Keys and values of all session slots, of one layer or of a stack of layers.

    Keys are stored transposed: both matmuls of decoding then read rows that are contiguous in memory.

    Attributes:
      k: `[*stack, B, G, K, S]`.
      v: `[*stack, B, G, S, K]`.
    """

    k: jax.Array
    v: jax.Array


class RetainedTokens(NamedTuple):
    """Which tokens are in the second ring of each session. All layers that retain tokens have the same.

    Attributes:
      count: `[B]` int32, how many tokens of the session have been retained so far, the forgotten ones included.
      position: `[B, retained]` int32, the position in its session of the token in each slot; `NOWHERE` for empty slots.
    """

    count: jax.Array
    position: jax.Array


class CacheStep(NamedTuple):
    """Where the T new tokens of each session stand. All layers with the same kind of attention share it.

    Attributes:
      length: `[B]` int32, how many of the T tokens are real; the others are padding.
      query: `[B, T]` int32, the position of each new token in its session.
      slots: `[B, T]` int32, the ring slot into which each new token is written; S for padding, which is dropped.
      visible: `[B, T, S]` bool, whether a query sees the token in a slot.
    """

    length: jax.Array
    query: jax.Array
    slots: jax.Array
    visible: jax.Array


def ring_slots(config: AttentionConfig, max_tokens: int) -> int:
    """Returns S, the slots of both rings and of the pinned tokens.

    The first ring is so long that a call of `max_tokens` tokens overwrites no key that one of its queries sees.
    """
    return config.pinned + -(-(config.window + max_tokens - 1) // 16) * 16 + config.retained


def plan_cache_step(
    config: AttentionConfig,
    slots: int,
    position: jax.Array,
    length: jax.Array,
    tokens: int,
    retained: RetainedTokens | None = None,
) -> CacheStep:
    """Plans one call.

    Args:
      config: window, pinned and retained tokens.
      slots: S, from `ring_slots`.
      position: `[B]` int32, how many tokens of each session are in the cache.
      length: `[B]` int32, how many of the new tokens are real.
      tokens: T, the number of new tokens, padding included.
      retained: which tokens are in the second ring, if there is one; None: it is empty.
    """
    ring = slots - config.pinned - config.retained
    query = position[:, None] + jnp.arange(tokens)  # [B, T]
    real = jnp.arange(tokens) < length[:, None]
    slot = jnp.where(query < config.pinned, query, config.pinned + (query - config.pinned) % ring)
    slot = jnp.where(real, slot, slots)
    # `cached` [B, S]: the position of the token in each slot once the new tokens are written; -1: none.
    newest = position + length - 1
    index = jnp.arange(config.pinned + ring)
    ring_position = newest[:, None] - (newest[:, None] - index) % ring
    cached = jnp.where(index < config.pinned, index, ring_position)
    cached = jnp.where((cached >= config.pinned) | (index < config.pinned), cached, -1)
    distance = query[:, :, None] - cached[:, None, :]
    in_reach = (distance < config.window) | (cached[:, None, :] < config.pinned)
    visible = (distance >= 0) & in_reach & (cached >= 0)[:, None, :]
    if config.retained:
        if retained is None:
            retained = empty_retained(config, len(position))
        # Within the window the first ring has the token, so the second ring shows it only beyond.
        beyond = query[:, :, None] - retained.position[:, None, :] >= config.window
        visible = jnp.concatenate([visible, beyond], axis=2)
    return CacheStep(length, query, slot, visible)


def write_cache(
    cache: KVCache, step: CacheStep, keys: jax.Array, values: jax.Array, layer_index: tuple[jax.Array, ...]
) -> KVCache:
    """Writes the new keys and values `[B, T, G, K]` of one layer into their slots; padding is dropped.

    `layer_index` is empty, or the layer's index if `cache` is that of a stack of layers.
    """
    rows = jnp.arange(keys.shape[0])[:, None]
    everything = slice(None)
    k = cache.k.at[(*layer_index, rows, everything, everything, step.slots)].set(
        keys.astype(cache.k.dtype), mode="drop"
    )
    v = cache.v.at[(*layer_index, rows, everything, step.slots)].set(values.astype(cache.v.dtype), mode="drop")
    return KVCache(k, v)


def empty_retained(config: AttentionConfig, batch: int) -> RetainedTokens:
    """Returns the `RetainedTokens` of `batch` sessions that have not begun."""
    return RetainedTokens(jnp.zeros((batch,), jnp.int32), jnp.full((batch, config.retained), NOWHERE, jnp.int32))


class RetentionStep(NamedTuple):
    """Which slots are copied to which, `[B, N]` int32 each.

    Attributes:
      source: slots of the first ring.
      target: slots of the second ring; S where there is nothing to copy.
    """

    source: jax.Array
    target: jax.Array


def plan_retention(
    config: AttentionConfig, slots: int, retained: RetainedTokens, position: jax.Array, count: jax.Array
) -> tuple[RetentionStep, RetainedTokens]:
    """Plans to retain up to N tokens of each session, which must still be in the first ring.

    Args:
      config: pinned and retained tokens. A pinned token is not retained besides.
      slots: S, from `ring_slots`.
      retained: which tokens are in the second ring.
      position: `[B, N]` int32, the positions of the tokens in their session, in order.
      count: `[B]` int32, how many of the N tokens are real.

    Returns:
      The copies, and which tokens are in the second ring after them.
    """
    ring = slots - config.pinned - config.retained
    new = (jnp.arange(position.shape[1]) < count[:, None]) & (position >= config.pinned)
    ordinal = retained.count[:, None] + jnp.cumsum(new, axis=1) - 1
    total = retained.count + new.sum(axis=1)
    new &= ordinal >= total[:, None] - config.retained  # of more tokens than slots, only the last
    slot = jnp.where(new, ordinal % config.retained, config.retained)
    rows = jnp.arange(len(position))[:, None]
    step = RetentionStep(config.pinned + (position - config.pinned) % ring, slots - config.retained + slot)
    return step, RetainedTokens(total, retained.position.at[rows, slot].set(position, mode="drop"))


def copy_retained(cache: KVCache, step: RetentionStep) -> KVCache:
    """Copies keys and values into the second ring, of one layer or of a stack of layers."""

    def of_session(k: jax.Array, v: jax.Array, source: jax.Array, target: jax.Array) -> KVCache:
        k = k.at[..., target].set(k[..., source], mode="drop")
        return KVCache(k, v.at[..., target, :].set(v[..., source, :], mode="drop"))

    return jax.vmap(of_session, in_axes=(-4, -4, 0, 0), out_axes=-4)(*cache, *step)


def attend_cache(
    config: AttentionConfig, query: jax.Array, cache: KVCache, rel: jax.Array, proj: jax.Array, step: CacheStep
) -> jax.Array:
    """Computes attention of T new tokens over the ring buffers of one layer.

    Where all queries together would have more than `MAX_LOGITS` logits, they are computed in parts, one after the
    other.

    Args:
      config: pinned and retained tokens.
      query: `[B, T, G, Q, K]`, scaled.
      cache: keys and values of one layer, the new tokens included.
      rel: `[B, T, G, Q, R]`, the relative state, scaled like the queries.
      proj: `[R, E]`, which `rel` mixes into one bias per distance.
      step: from `plan_cache_step`.

    Returns:
      `[B, T, G, Q, K]`.
    """
    batch, tokens, groups, per_group, width = query.shape
    slots = cache.k.shape[-1]
    dtype = query.dtype

    def attend(query: jax.Array, rel: jax.Array, position: jax.Array, visible: jax.Array) -> jax.Array:
        t = query.shape[1]
        flat = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * t, width)
        logits = jnp.matmul(flat, cache.k.astype(dtype), preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, groups, per_group, t, slots)
        bias = ring_bias(rel @ proj, position, config.pinned, slots - config.retained).transpose(0, 2, 3, 1, 4)
        bias = jnp.pad(bias, [(0, 0)] * 4 + [(0, config.retained)])  # retained tokens have none
        logits = jnp.where(visible[:, None, None], logits + bias, MASKED_LOGIT)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype).reshape(*flat.shape[:3], slots)
        out = (weights @ cache.v.astype(dtype)).reshape(batch, groups, per_group, t, width)
        return out.transpose(0, 3, 1, 2, 4)

    operands = (query, rel, step.query, step.visible)
    part = max(1, MAX_LOGITS // (batch * groups * per_group * slots))
    if tokens <= part:
        return attend(*operands)
    count = -(-tokens // part)
    part = -(-tokens // count)

    def split(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [count, B, part, ...]
        a = jnp.pad(a, [(0, 0), (0, count * part - tokens)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, count, part, *a.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda parts: attend(*parts), tuple(split(a) for a in operands))
    return out.swapaxes(0, 1).reshape(batch, count * part, *out.shape[3:])[:, :tokens]


def ring_bias(profile: jax.Array, position: jax.Array, pinned: int, slots: int) -> jax.Array:
    """Turns each query's bias by distance (its profile) into the query's bias by slot.

    The profile is reversed, cut or padded to the ring, and repeated once. In this line, the biases of the ring's
    slots are one contiguous stretch, which begins at a place that depends on the query's position. Cutting out the
    stretch copies contiguous memory. Looking up the distance of every slot would gather number by number. Slots that
    hold a token which the query cannot see get a bias too; the caller masks them.

    Args:
      profile: `[B, T, G, Q, E]`, the bias by distance.
      position: `[B, T]` int32, the position of each query in its session.
      pinned: how many of the first slots hold pinned tokens.
      slots: S, without the second ring.

    Returns:
      `[B, T, G, Q, S]`.
    """
    ring, extent = slots - pinned, profile.shape[-1]
    kept = min(extent, ring)
    zeros = jnp.zeros((*profile.shape[:-1], ring - kept), profile.dtype)
    line = jnp.concatenate([profile[..., :1], zeros, profile[..., kept - 1 : 0 : -1]], axis=-1)
    line = jnp.concatenate([line, line], axis=-1)
    start = ring - (position - pinned) % ring
    cut = jax.vmap(jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, ring, axis=-1)))
    in_ring = cut(line, start)
    if not pinned:
        return in_ring
    distance = (position[..., None] - jnp.arange(pinned))[:, :, None, None]
    index = jnp.broadcast_to(jnp.clip(distance, 0, extent - 1), (*profile.shape[:-1], pinned))
    at_pinned = jnp.where(distance < extent, jnp.take_along_axis(profile, index, axis=-1), 0)
    return jnp.concatenate([at_pinned, in_ring], axis=-1)
