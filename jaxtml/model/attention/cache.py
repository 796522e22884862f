"""Attention that continues sessions: the past keys and values of each session are in ring buffers.

Axes: B session slots, T tokens of this call, G key/value heads, Q query heads per key/value head, K head width, R width
of the relative state, E relative extent, S slots of the ring buffer, F slots of the second ring. Called by `attention`
and `backbone`.

The first `pinned` slots keep a session's first tokens until the session ends. The slots after them are a ring: a new
token overwrites the oldest one. A query may see a slot only if `CacheStep.visible` says so. So a query never sees what
an earlier session left in a slot.

Layers that retain tokens (`retention`) have a second ring. When a micro-turn with text is complete, its retained tokens
are copied there, over the oldest ones. A micro-turn without text copies nothing. The second ring is read in `FAR_PARTS`
parts, and a part that no session has filled yet is skipped: a session that has said little costs little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.online_softmax import SoftmaxSums, add_keys, begin_softmax, finish_softmax
from jaxtml.model.numerics import MASKED_LOGIT

NOWHERE = 2**31 - 1  # the position of a token that does not exist: after every query, so that no query sees it
FAR_PARTS = 8  # parts in which the second ring is read
MAX_LOGITS = 2**26  # logits in memory at a time: a quarter of a gigabyte in float32


class SecondRing(NamedTuple):
    """Keys and values of retained tokens.

    Attributes:
      k: `[*stack, B, G, K, F]`.
      v: `[*stack, B, G, F, K]`.
    """

    k: jax.Array
    v: jax.Array


class KVCache(NamedTuple):
    """Keys and values of all session slots, of one layer or of a stack of layers.

    Keys are stored transposed: both matmuls of decoding then read rows that are contiguous in memory.

    Attributes:
      k: `[*stack, B, G, K, S]`.
      v: `[*stack, B, G, S, K]`.
      far: None in layers that retain no tokens.
    """

    k: jax.Array
    v: jax.Array
    far: SecondRing | None = None

    def layer(self, index: tuple[jax.Array, ...]) -> KVCache:
        """Returns the cache of one layer of a stack."""
        return jax.tree.map(lambda array: array[index], self)


class RetainedTokens(NamedTuple):
    """Which tokens are in the second ring of each session. All layers that retain tokens have the same.

    Attributes:
      count: `[B]` int32, how many tokens of the session have been retained so far, the forgotten ones included.
      position: `[B, F]` int32, the position in its session of the token in each slot; `NOWHERE` for empty slots.
    """

    count: jax.Array
    position: jax.Array


class FarStep(NamedTuple):
    """What the T new tokens of each session see in the second ring.

    Attributes:
      visible: `[B, T, F]` bool, whether a query sees the token in a slot.
      used: int32 scalar, so many slots hold a token in some session.
    """

    visible: jax.Array
    used: jax.Array


class CacheStep(NamedTuple):
    """Where the T new tokens of each session stand. All layers with the same kind of attention share it.

    Attributes:
      length: `[B]` int32, how many of the T tokens are real; the others are padding.
      query: `[B, T]` int32, the position of each new token in its session.
      slots: `[B, T]` int32, the ring slot into which each new token is written; S for padding, which is dropped.
      visible: `[B, T, S]` bool, whether a query sees the token in a slot.
      far: None in layers that retain no tokens.
    """

    length: jax.Array
    query: jax.Array
    slots: jax.Array
    visible: jax.Array
    far: FarStep | None = None


def ring_slots(config: AttentionConfig, max_tokens: int) -> int:
    """Returns S, the slots of the first ring and of the pinned tokens.

    The ring is so long that a call of `max_tokens` tokens overwrites no key that one of its queries sees.
    """
    return config.pinned + -(-(config.window + max_tokens - 1) // 16) * 16


def empty_cache(
    config: AttentionConfig, stack: tuple[int, ...], batch: int, max_tokens: int, dtype: DTypeLike
) -> KVCache:
    """Returns the cache of `batch` sessions that have not begun, of a layer or a stack of layers."""

    def ring(slots: int) -> tuple[jax.Array, jax.Array]:
        head, g = config.head_dim, config.n_kv_heads
        return jnp.zeros((*stack, batch, g, head, slots), dtype), jnp.zeros((*stack, batch, g, slots, head), dtype)

    far = SecondRing(*ring(config.retained)) if config.retained else None
    return KVCache(*ring(ring_slots(config, max_tokens)), far)


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
    ring = slots - config.pinned
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
    if not config.retained:
        return CacheStep(length, query, slot, visible)
    if retained is None:
        retained = empty_retained(config, len(position))
    # Within the window the first ring has the token, so the second ring shows it only beyond.
    beyond = query[:, :, None] - retained.position[:, None, :] >= config.window
    far = FarStep(beyond, jnp.minimum(retained.count.max(), config.retained))
    return CacheStep(length, query, slot, visible, far)


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
    return cache._replace(k=k, v=v)


def empty_retained(config: AttentionConfig, batch: int) -> RetainedTokens:
    """Returns the `RetainedTokens` of `batch` sessions that have not begun."""
    return RetainedTokens(jnp.zeros((batch,), jnp.int32), jnp.full((batch, config.retained), NOWHERE, jnp.int32))


class RetentionStep(NamedTuple):
    """Which slots are copied to which, `[B, N]` int32 each.

    Attributes:
      source: slots of the first ring.
      target: slots of the second ring; F where there is nothing to copy.
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
    ring = slots - config.pinned
    new = (jnp.arange(position.shape[1]) < count[:, None]) & (position >= config.pinned)
    ordinal = retained.count[:, None] + jnp.cumsum(new, axis=1) - 1
    total = retained.count + new.sum(axis=1)
    new &= ordinal >= total[:, None] - config.retained  # of more tokens than slots, only the last
    slot = jnp.where(new, ordinal % config.retained, config.retained)
    rows = jnp.arange(len(position))[:, None]
    step = RetentionStep(config.pinned + (position - config.pinned) % ring, slot)
    return step, RetainedTokens(total, retained.position.at[rows, slot].set(position, mode="drop"))


def copy_retained(cache: KVCache, step: RetentionStep) -> KVCache:
    """Copies keys and values into the second ring, of one layer or of a stack of layers."""

    def of_session(far: SecondRing, cache: KVCache, step: RetentionStep) -> SecondRing:
        k = far.k.at[..., step.target].set(cache.k[..., step.source], mode="drop")
        return SecondRing(k, far.v.at[..., step.target, :].set(cache.v[..., step.source, :], mode="drop"))

    assert cache.far is not None
    return cache._replace(far=jax.vmap(of_session, in_axes=(-4, -4, 0), out_axes=-4)(cache.far, cache, step))


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

    def attend(
        query: jax.Array, rel: jax.Array, position: jax.Array, visible: jax.Array, beyond: jax.Array | None
    ) -> jax.Array:
        t = query.shape[1]
        flat = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * t, width)
        logits = jnp.matmul(flat, cache.k.astype(dtype), preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, groups, per_group, t, slots)
        logits += ring_bias(rel @ proj, position, config.pinned, slots).transpose(0, 2, 3, 1, 4)
        logits = jnp.where(visible[:, None, None], logits, MASKED_LOGIT)
        if cache.far is None or step.far is None or beyond is None:
            weights = jax.nn.softmax(logits, axis=-1).astype(dtype).reshape(*flat.shape[:3], slots)
            out = weights @ cache.v.astype(dtype)
        else:
            sums = add_keys(begin_softmax(flat.shape), logits.reshape(*flat.shape[:3], slots), cache.v, _weigh(dtype))
            sums = _add_far_keys(sums, flat, cache.far, FarStep(beyond, step.far.used))
            out = finish_softmax(sums)[0].astype(dtype)
        out = out.reshape(batch, groups, per_group, t, width)
        return out.transpose(0, 3, 1, 2, 4)

    operands = (query, rel, step.query, step.visible, step.far.visible if step.far is not None else None)
    part = max(1, MAX_LOGITS // (batch * groups * per_group * (slots + config.retained)))
    if tokens <= part:
        return attend(*operands)
    count = -(-tokens // part)
    part = -(-tokens // count)

    def split(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [count, B, part, ...]
        a = jnp.pad(a, [(0, 0), (0, count * part - tokens)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, count, part, *a.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda parts: attend(*parts), jax.tree.map(split, operands))
    return out.swapaxes(0, 1).reshape(batch, count * part, *out.shape[3:])[:, :tokens]


def _add_far_keys(sums: SoftmaxSums, query: jax.Array, ring: SecondRing, step: FarStep) -> SoftmaxSums:
    """Continues a softmax over the second ring, part by part.

    A part in which a query sees nothing leaves its sums as they are, to the bit. So what a session computes does not
    depend on how much the other sessions retain.

    Args:
      sums: over the first ring.
      query: `[B, G, Q T, K]`, scaled.
      ring: keys and values of one layer.
      step: what the queries see.
    """
    dtype = query.dtype
    slots = ring.k.shape[-1]
    size = slots // math.gcd(FAR_PARTS, slots)
    repeats = query.shape[2] // step.visible.shape[1]

    def add_part(start: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
        keys = jax.lax.dynamic_slice_in_dim(ring.k, start, size, axis=-1)
        values = jax.lax.dynamic_slice_in_dim(ring.v, start, size, axis=-2)
        visible = jax.lax.dynamic_slice_in_dim(step.visible, start, size, axis=-1)
        logits = jnp.matmul(query, keys.astype(dtype), preferred_element_type=jnp.float32)
        logits = jnp.where(jnp.tile(visible, (1, repeats, 1))[:, None], logits, MASKED_LOGIT)
        return add_keys(sums, logits, values, _weigh(dtype))

    def next_part(sums: SoftmaxSums, start: jax.Array) -> tuple[SoftmaxSums, None]:
        return jax.lax.cond(start < step.used, partial(add_part, start), lambda same: same, sums), None

    return jax.lax.scan(next_part, sums, jnp.arange(0, slots, size))[0]


def _weigh(dtype: jnp.dtype) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function that weighs values `[..., S, K]` with `[..., S]`: products in `dtype`, sums in float32."""

    def weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.matmul(weights.astype(dtype), values.astype(dtype), preferred_element_type=jnp.float32)

    return weigh


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
      slots: S.

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
