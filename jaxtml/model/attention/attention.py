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
from jaxtml.model.attention.attend import HIDDEN, attend_sequence
from jaxtml.model.layers import RMSNorm, ShortConv, project, rms_normalise
from jaxtml.model.placement import ALONE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, param
from jaxtml.parallel.collectives import psum_backward, psum_forward

LOGITS = 2**26  # of a call that continues sessions, at a time: a quarter of a gigabyte


class KVCache(NamedTuple):
    """Keys and values of a batch of sessions, of one layer or of a stack of layers.

    Keys are stored transposed, `[*stack, B, G, K, S]`, values `[*stack, B, G, S, K]`: both decode matmuls then read
    rows that lie together. Slots `[0, pinned)` hold the session's first tokens for good, the rest is a ring.
    """

    k: jax.Array
    v: jax.Array


class Step(NamedTuple):
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
    return Step(length, query, slot, visible)


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
        at: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, KVCache | None, tuple[jax.Array, jax.Array]]:
        """`x` `[B, T, D]` -> `[B, T, D]`, the new cache and the new convolution tails.

        `at` is the layer's place in a cache of a stack. On a mesh, each device of `tensor` has its share of the heads.
        """
        batch, tokens, _ = x.shape
        ways = self.mesh.tensor
        h, g, k = self.config.n_heads // ways, self.config.n_kv_heads // ways, self.config.head_dim
        x, rel_proj = (psum_backward(a, self.mesh, TENSOR) for a in (x, self.rel[...]))
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
            scale = self._length_scale(step.query if step is not None else jnp.arange(tokens))
            if step is not None:
                query, rel = (a * scale.astype(dtype)[..., None, None] for a in (query, rel))
        query = query.reshape(batch, tokens, g, h // g, k)
        rel = rel.reshape(batch, tokens, g, h // g, -1)
        proj = rel_proj.astype(dtype)
        if step is None:
            out = attend_sequence(self.config, query, keys, values, rel, proj, scale)
        else:
            assert cache is not None
            cache = _write(cache, step, keys, values, at)
            out = _attend_cache(self.config, query, KVCache(cache.k[at], cache.v[at]), rel, proj, step)
        out = out.reshape(batch, tokens, h * k)
        out = psum_forward(project(out, self.wo[...].astype(dtype)), self.mesh, TENSOR)
        return out, cache, (k_tail, v_tail)

    def _normed(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        """Per-head norm: one weight for all heads, of which this device may have a share."""
        return rms_normalise(x, norm.eps) * psum_backward(norm.weight[...], self.mesh, TENSOR).astype(x.dtype)

    def _length_scale(self, position: jax.Array) -> jax.Array:
        """Logits grow with the logarithm of the length once it passes the floor (float32)."""
        floor = self.backbone.log_scaling_floor
        assert floor is not None
        ratio = (position + 1).astype(jnp.float32) / floor
        return 1.0 + self.backbone.log_scaling_alpha * jnp.log(jnp.maximum(ratio, 1.0))


def _write(cache: KVCache, step: Step, keys: jax.Array, values: jax.Array, at: tuple[jax.Array, ...]) -> KVCache:
    """Puts the new keys and values `[B, T, G, K]` into their slots; padding is dropped."""
    rows = jnp.arange(keys.shape[0])[:, None]
    k = cache.k.at[(*at, rows, slice(None), slice(None), step.slots)].set(keys.astype(cache.k.dtype), mode="drop")
    v = cache.v.at[(*at, rows, slice(None), step.slots)].set(values.astype(cache.v.dtype), mode="drop")
    return KVCache(k, v)


def _attend_cache(
    config: AttentionConfig, query: jax.Array, cache: KVCache, rel: jax.Array, proj: jax.Array, step: Step
) -> jax.Array:
    """Attention of T new tokens over the ring of one layer: `query` `[B, T, G, Q, K]`, `rel` `[B, T, G, Q, R]`.

    A part of the queries after the other where all would have more than `LOGITS` logits.
    """
    batch, tokens, groups, per_group, width = query.shape
    slots = cache.k.shape[-1]
    dtype = query.dtype

    def some(query: jax.Array, rel: jax.Array, position: jax.Array, visible: jax.Array) -> jax.Array:
        t = query.shape[1]
        flat = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * t, width)
        logits = jnp.matmul(flat, cache.k.astype(dtype), preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, groups, per_group, t, slots)
        bias = _ring_bias(rel @ proj, position, config.pinned, slots).transpose(0, 2, 3, 1, 4)
        logits = jnp.where(visible[:, None, None], logits + bias, HIDDEN)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype).reshape(*flat.shape[:3], slots)
        out = (weights @ cache.v.astype(dtype)).reshape(batch, groups, per_group, t, width)
        return out.transpose(0, 3, 1, 2, 4)

    given = (query, rel, step.query, step.visible)
    part = max(1, LOGITS // (batch * groups * per_group * slots))
    if tokens <= part:
        return some(*given)
    count = -(-tokens // part)
    part = -(-tokens // count)

    def cut(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [count, B, part, ...]
        a = jnp.pad(a, [(0, 0), (0, count * part - tokens)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, count, part, *a.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda parts: some(*parts), tuple(cut(a) for a in given))
    return out.swapaxes(0, 1).reshape(batch, count * part, *out.shape[3:])[:, :tokens]


def _ring_bias(profile: jax.Array, position: jax.Array, pinned: int, slots: int) -> jax.Array:
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
