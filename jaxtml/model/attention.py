"""Inkling attention: grouped queries, per-head QK norm, query-conditioned relative bias, log-length scaling.

Axes: B batch, T tokens of this call, D model width, H query heads, G key/value heads, Q = H / G queries per group,
K head width, R width of the relative state, E relative extent, S slots of the ring buffer, C queries of a chunk.

One module, two ways to see the past: without a cache the T tokens are the whole sequence and queries are processed in
chunks that only touch the keys their window can reach (never a [T, T] array); with a cache the T tokens continue a
session, whose keys live in a ring buffer. Both give the same numbers (tests/model/test_streaming.py).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import AttentionConfig, BackboneConfig
from jaxtml.errors import InputError
from jaxtml.model.attend import HIDDEN, attend_sequence
from jaxtml.model.layers import RMSNorm, ShortConv, project, rms_normalise
from jaxtml.model.placement import ALONE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, param
from jaxtml.parallel.collectives import merge, spread


class KVCache(NamedTuple):
    """Keys and values of one layer for a batch of sessions.

    Keys are stored transposed, `[B, G, K, S]`, values `[B, G, S, K]`: both decode matmuls then read rows that lie
    together. Slots `[0, pinned)` hold the session's first tokens for good, the rest is a ring.
    """

    k: jax.Array
    v: jax.Array


class Step(NamedTuple):
    """Where the T new tokens of each session stand: shared by all layers of one kind.

    `slots` `[B, T]` is where each new token is written (S where it is padding: dropped); `distance` `[B, T, S]` int32
    is how far back each slot's key lies from each query (negative or beyond the window where it must not be seen).
    """

    position: jax.Array
    length: jax.Array
    slots: jax.Array
    distance: jax.Array
    visible: jax.Array


def ring_slots(config: AttentionConfig, max_tokens: int) -> int:
    """Slots a ring needs so that a call of `max_tokens` never overwrites a key that one of its queries still sees."""
    return config.pinned + -(-(config.window + max_tokens - 1) // 16) * 16


def make_step(config: AttentionConfig, slots: int, position: jax.Array, length: jax.Array, tokens: int) -> Step:
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
    return Step(position, length, slot, distance, visible)


class Attention(nnx.Module):
    """One attention layer; `config` is its kind (sliding or global)."""

    def __init__(
        self,
        backbone: BackboneConfig,
        config: AttentionConfig,
        scaled: bool,
        prefix: str,
        placement: Placement = ALONE,
    ):
        d, h, g, k, r = backbone.d_model, config.n_heads, config.n_kv_heads, config.head_dim, backbone.d_rel
        self.config = config
        self.backbone = backbone
        self.mesh = placement.mesh
        if g % self.mesh.tensor:
            raise InputError(f"tensor={self.mesh.tensor} does not divide {g} kv heads: choose a divisor of {g}")
        self.scaled = scaled and backbone.log_scaling_floor is not None
        init = normal(backbone.init_std)
        self.wq = param((d, h * k), ("embed", "heads"), init, released=linear(f"{prefix}.wq_du.weight", d, h * k))
        self.wk = param((d, g * k), ("embed", "kv_heads"), init, released=linear(f"{prefix}.wk_dv.weight", d, g * k))
        self.wv = param((d, g * k), ("embed", "kv_heads"), init, released=linear(f"{prefix}.wv_dv.weight", d, g * k))
        self.wr = param((d, h * r), ("embed", "heads"), init, released=linear(f"{prefix}.wr_du.weight", d, h * r))
        self.wo = param((h * k, d), ("heads", "embed"), init, released=linear(f"{prefix}.wo_ud.weight", h * k, d))
        self.rel = param(
            (r, config.rel_extent),
            ("rel", "extent"),
            init,
            released=Released(f"{prefix}.rel_logits_proj.proj", (r, config.rel_extent)),
        )
        self.q_norm = RMSNorm(k, backbone.norm_eps, "head_dim", f"{prefix}.q_norm.weight")
        self.k_norm = RMSNorm(k, backbone.norm_eps, "head_dim", f"{prefix}.k_norm.weight")
        self.k_conv = ShortConv(g * k, backbone.conv_kernel, "kv_heads", f"{prefix}.k_sconv.weight")
        self.v_conv = ShortConv(g * k, backbone.conv_kernel, "kv_heads", f"{prefix}.v_sconv.weight")

    def __call__(
        self,
        x: jax.Array,
        step: Step | None = None,
        cache: KVCache | None = None,
        tails: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, KVCache | None, tuple[jax.Array, jax.Array]]:
        """`x` `[B, T, D]` -> `[B, T, D]`, the new cache and the new convolution tails.

        On a mesh, each device of `tensor` has its share of the heads.
        """
        batch, tokens, _ = x.shape
        ways = self.mesh.tensor
        h, g, k = self.config.n_heads // ways, self.config.n_kv_heads // ways, self.config.head_dim
        x, rel_proj = (spread(a, self.mesh, TENSOR) for a in (x, self.rel[...]))
        dtype = x.dtype
        length = step.length if step is not None else None
        k_tail, v_tail = tails if tails is not None else (None, None)

        keys, k_tail = self.k_conv(project(x, self.wk[...].astype(dtype)), k_tail, length)
        values, v_tail = self.v_conv(project(x, self.wv[...].astype(dtype)), v_tail, length)
        query = self._normed(self.q_norm, project(x, self.wq[...].astype(dtype)).reshape(batch, tokens, h, k))
        keys = self._normed(self.k_norm, keys.reshape(batch, tokens, g, k))
        values = values.reshape(batch, tokens, g, k)
        rel = (project(x, self.wr[...].astype(dtype))).reshape(batch, tokens, h, -1)
        # 1 / d, not 1 / sqrt(d): both sides are normalised
        query = query / k
        scale = None
        if self.scaled:
            scale = self._length_scale((step.position[:, None] if step is not None else 0) + jnp.arange(tokens))
            if step is not None:
                query, rel = (a * scale.astype(dtype)[..., None, None] for a in (query, rel))
        query = query.reshape(batch, tokens, g, h // g, k)
        rel = rel.reshape(batch, tokens, g, h // g, -1)
        proj = rel_proj.astype(dtype)
        if step is None:
            out = attend_sequence(self.config, query, keys, values, rel, proj, scale)
        else:
            assert cache is not None
            cache = _write(cache, step, keys, values)
            query, rel = (a.transpose(0, 2, 3, 1, 4) for a in (query, rel))  # [B, G, Q, T, .]
            out = _attend_cache(query, cache, rel, proj, step).transpose(0, 3, 1, 2, 4)
        out = out.reshape(batch, tokens, h * k)
        out = merge(project(out, self.wo[...].astype(dtype)), self.mesh, TENSOR)
        return out, cache, (k_tail, v_tail)

    def _normed(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        """Per-head norm: one weight for all heads, of which this device may have a share."""
        return rms_normalise(x, norm.eps) * spread(norm.weight[...], self.mesh, TENSOR).astype(x.dtype)

    def _length_scale(self, position: jax.Array) -> jax.Array:
        """Logits grow with the logarithm of the length once it passes the floor (float32)."""
        floor = self.backbone.log_scaling_floor
        assert floor is not None
        ratio = (position + 1).astype(jnp.float32) / floor
        return 1.0 + self.backbone.log_scaling_alpha * jnp.log(jnp.maximum(ratio, 1.0))


def _write(cache: KVCache, step: Step, keys: jax.Array, values: jax.Array) -> KVCache:
    """Puts the new keys and values `[B, T, G, K]` into their slots; padding is dropped."""
    rows = jnp.arange(keys.shape[0])[:, None]
    k = cache.k.at[rows, :, :, step.slots].set(keys.astype(cache.k.dtype), mode="drop")
    v = cache.v.at[rows, :, step.slots, :].set(values.astype(cache.v.dtype), mode="drop")
    return KVCache(k, v)


def _attend_cache(query: jax.Array, cache: KVCache, rel: jax.Array, proj: jax.Array, step: Step) -> jax.Array:
    """Attention of T new tokens over the ring; returns `[B, G, Q, T, K]`."""
    b, g, q, t, k = query.shape
    extent = proj.shape[1]
    slots = cache.k.shape[-1]
    dtype = query.dtype
    logits = (query.reshape(b, g, q * t, k) @ cache.k.astype(dtype)).reshape(b, g, q, t, slots)
    profile = rel @ proj  # [B, G, Q, T, E]
    inside = (step.distance >= 0) & (step.distance < extent)
    index = jnp.clip(step.distance, 0, extent - 1)[:, None, None]
    bias = jnp.take_along_axis(profile, jnp.broadcast_to(index, logits.shape), axis=-1)
    bias = jnp.where(inside[:, None, None], bias, 0)
    logits = jnp.where(step.visible[:, None, None], (logits + bias).astype(jnp.float32), HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
    return (weights.reshape(b, g, q * t, slots) @ cache.v.astype(dtype)).reshape(b, g, q, t, k)
