"""Input embeddings: text, clock, dMel frames and image patches. Each is a few light layers; there are no encoders.

Axes: B batch, T positions, D model width, V vocabulary, P patches. Called by `interaction` and `duplex.step`. The dMel
bag of embeddings and the hMLP are the released ones (Inkling). The clock is new here. It starts at zero, so that it
changes nothing before it is trained.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig, VisionConfig
from jaxtml.model.layers import RMSNorm
from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, param, zeros
from jaxtml.parallel.collectives import psum_forward
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.timebase import N_BINS, N_MELS

FEW_FRAMES = 32  # up to this many frames, the bag of embeddings is a gather; beyond, a one-hot matmul is faster


class TextEmbedding(nnx.Module):
    """A token embedding followed by an RMS norm."""

    def __init__(self, config: BackboneConfig, placement: Placement = SINGLE_DEVICE):
        v, d = config.vocab_size, config.d_model
        self.mesh = placement.mesh
        # A token reads one row, however large the vocabulary is: 1 / V of the table is active.
        self.weight = param(
            (v, d),
            ("vocab", "embed"),
            normal(config.init_std),
            released=Released("model.llm.embed.weight", (v, d)),
            active=1.0 / v,
        )
        self.norm = RMSNorm(d, config.norm_eps, "embed", "model.llm.embed_norm.weight")

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`ids` `[...]` int32 -> `[..., D]`; on a mesh, each device of `tensor` has its share of the vocabulary."""
        table = self.weight[...].astype(dtype)
        if self.mesh.tensor == 1:
            return self.norm(table[ids])
        local = ids - len(table) * jax.lax.axis_index("tensor")
        here = (local >= 0) & (local < len(table))
        rows = jnp.where(here[..., None], table[jnp.clip(local, 0, len(table) - 1)], 0)
        return self.norm(psum_forward(rows, self.mesh, TENSOR))


class DmelTower(nnx.Module):
    """A bag of embeddings: the sum of one row per mel channel, then an RMS norm (dMel, Bai et al., 2024)."""

    def __init__(self, config: BackboneConfig):
        d = config.d_model
        self.weight = param(
            (N_MELS * N_BINS, d),
            ("dmel", "embed"),
            normal(config.init_std),
            released=Released("model.audio.encoder.weight", (N_MELS * N_BINS, d)),
            active=1.0 / N_BINS,
        )
        self.norm = RMSNorm(d, 1e-6, "embed", "model.audio.final_norm.weight")

    def __call__(self, bins: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Embeds frames: `bins` `[..., 80]`, integers from 0 to 15 -> `[..., D]`."""
        table = self.weight[...].astype(dtype)
        frames = bins.reshape(-1, N_MELS).astype(jnp.int32)
        if frames.shape[0] <= FEW_FRAMES:
            out = table[frames + N_BINS * jnp.arange(N_MELS)].sum(axis=1)
        else:
            out = jax.nn.one_hot(frames, N_BINS, dtype=dtype).reshape(-1, N_MELS * N_BINS) @ table
        return self.norm(out).reshape(*bins.shape[:-1], -1)


class HMLP(nnx.Module):
    """Makes one token of each 40 x 40 patch of a frame pair, folding it step by step (hMLP, Touvron et al., 2022)."""

    def __init__(self, config: VisionConfig, backbone: BackboneConfig):
        self.folds = config.folds
        last = len(config.folds) - 1
        width = 3
        for i, (time, side, out) in enumerate(config.folds):
            inputs = width * time * side * side
            width = backbone.d_model if i == last else out
            weight = param(
                (inputs, width),
                ("patch_wide" if i == last - 1 else "patch", "embed" if i == last else "patch_hidden"),
                normal(backbone.init_std),
                released=linear(f"model.visual.layers.linear_{i}.weight", inputs, width),
                active=0.0,
            )
            setattr(self, f"linear_{i}", weight)
            if i < last:
                setattr(self, f"norm_{i}", RMSNorm(width, 1e-6, "norm", f"model.visual.layers.norm_{i}.weight"))
        self.final_norm = RMSNorm(backbone.d_model, 1e-6, "embed", "model.visual.final_norm.weight")

    def __call__(self, patches: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Embeds normalised patches: `[P, 2, 40, 40, 3]` (two frames, RGB) -> `[P, D]`."""
        x = patches.astype(dtype)
        for i, (time, side, _) in enumerate(self.folds):
            p, t, h, w, c = x.shape
            x = x.reshape(p, t // time, time, h // side, side, w // side, side, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
            x = x.reshape(p, t // time, h // side, w // side, time * side * side * c)
            x = x @ getattr(self, f"linear_{i}")[...].astype(dtype)
            if i < len(self.folds) - 1:
                x = jax.nn.gelu(getattr(self, f"norm_{i}")(x), approximate=False)
        return self.final_norm(x.reshape(patches.shape[0], -1))


class ClockTower(nnx.Module):
    """A linear map of the clock features: how long the session has lasted, and the wall clock.

    The result is added to the embedding of the TURN token. The map is initially zero.
    """

    def __init__(self, config: BackboneConfig):
        self.weight = param((CLOCK_FEATURES, config.d_model), ("clock", "embed"), zeros)

    def __call__(self, features: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`features` `[..., CLOCK_FEATURES]` -> `[..., D]`."""
        return features.astype(dtype) @ self.weight[...].astype(dtype)
