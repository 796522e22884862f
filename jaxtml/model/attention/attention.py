"""The attention layer of Inkling: grouped queries, QK norm per head, relative bias, log-length scaling.

The relative bias is query-conditioned: each query has a relative state, which mixes the rows of a learned table into
one bias per distance. Called by `backbone`.

Axes: B batch, T tokens of this call, D model width, H query heads, G key/value heads, Q = H / G query heads per
key/value head, K head width, R width of the relative state, E relative extent.

The layer sees the past in one of two ways. Without a cache, the T tokens are complete sequences (`sequence`): queries
are processed in chunks that only touch the keys within their window, and an array of `[T, T]` never exists. With a
cache, the T tokens continue sessions whose keys are in a ring buffer (`cache`). Both ways give the same numbers
(tests/model/test_streaming.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import AttentionConfig, BackboneConfig
from jaxtml.errors import InputError
from jaxtml.model.attention.cache import CacheStep, KVCache, attend_cache, write_cache
from jaxtml.model.attention.retention import FarTokens
from jaxtml.model.attention.sequence import attend_sequence
from jaxtml.model.layers import RMSNorm, ShortConv, project, rms_normalise
from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, param
from jaxtml.parallel.collectives import psum_backward


class Attention(nnx.Module):
    """One attention layer, sliding or global.

    The constructor's `config` has the sizes of this kind of layer, sliding or global. `scaled` says whether this kind
    has log-length scaling.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        config: AttentionConfig,
        scaled: bool,
        prefix: str,
        placement: Placement = SINGLE_DEVICE,
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
        step: CacheStep | None = None,
        cache: KVCache | None = None,
        tails: tuple[jax.Array, jax.Array] | None = None,
        layer_index: tuple[jax.Array, ...] = (),
        far: FarTokens | None = None,
    ) -> tuple[jax.Array, KVCache | None, tuple[jax.Array, jax.Array]]:
        """Computes attention; on a mesh, each device of `tensor` computes its share of the heads.

        The caller sums the result over the devices of `tensor`.

        Args:
          x: `[B, T, D]`, normed hidden states.
          step: where the T tokens stand in their sessions; None: they are complete sequences.
          cache: keys and values of the sessions; needed with `step`.
          tails: the tails of the two short convolutions, of keys and of values: their last inputs before these T
            tokens. None: zeros.
          layer_index: empty, or the layer's index in a stack. In the latter case, `cache` is that of the complete
            stack.
          far: what whole sequences see beyond the window of a layer that retains tokens; None: no tokens are retained.

        Returns:
          `[B, T, D]`, which is this device's part of a sum over `tensor`; the new cache (None without `step`) and the
          new tails.
        """
        batch, tokens, _ = x.shape
        shards = self.mesh.tensor
        h, g, k = self.config.n_heads // shards, self.config.n_kv_heads // shards, self.config.head_dim
        x, rel_proj = (psum_backward(a, self.mesh, TENSOR) for a in (x, self.rel[...]))
        dtype = x.dtype
        length = step.length if step is not None else None
        k_tail, v_tail = tails if tails is not None else (None, None)

        keys, k_tail = self.k_conv(project(x, self.wk[...].astype(dtype)), k_tail, length)
        values, v_tail = self.v_conv(project(x, self.wv[...].astype(dtype)), v_tail, length)
        query = self._norm_heads(self.q_norm, project(x, self.wq[...].astype(dtype)).reshape(batch, tokens, h, k))
        keys = self._norm_heads(self.k_norm, keys.reshape(batch, tokens, g, k))
        values = values.reshape(batch, tokens, g, k)
        rel = (project(x, self.wr[...].astype(dtype))).reshape(batch, tokens, h, -1)
        # Logits are scaled by 1 / K, not by 1 / sqrt(K), because queries and keys are both normed.
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
            out = attend_sequence(self.config, query, keys, values, rel, proj, scale, far)
        else:
            assert cache is not None
            cache = write_cache(cache, step, keys, values, layer_index)
            out = attend_cache(self.config, query, cache.layer(layer_index), rel, proj, step)
        out = out.reshape(batch, tokens, h * k)
        return project(out, self.wo[...].astype(dtype)), cache, (k_tail, v_tail)

    def _norm_heads(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        """Norms each head of `x` `[B, T, heads, K]` with one weight; a device may have only a share of the heads."""
        return rms_normalise(x, norm.eps) * psum_backward(norm.weight[...], self.mesh, TENSOR).astype(x.dtype)

    def _length_scale(self, position: jax.Array) -> jax.Array:
        """Returns the factor of each query's logits, float32.

        Beyond `log_scaling_floor` tokens, the factor grows with the logarithm of the query's position.
        """
        floor = self.backbone.log_scaling_floor
        assert floor is not None
        ratio = (position + 1).astype(jnp.float32) / floor
        return 1.0 + self.backbone.log_scaling_alpha * jnp.log(jnp.maximum(ratio, 1.0))
