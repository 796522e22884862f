"""Multi-token prediction: a chain of heads, each of which foresees the words of one position more (DeepSeek-V3, 2024).

Axes: B batch, T positions, D model width, H heads. Head d takes the hidden state at position i, of the backbone after
its final norm or of the head before, and what stands at position i + d + 1, embedded as the backbone reads it; what
comes out of its layer is scored with the model's own unembedding, without another norm, for the target of position
i + d + 1. So are the released heads wired (`vllm` and measurements on the released weights; `transformers` 5.24 leaves
out the embedding's norm). They are a loss of training: nothing that serves reads them. Called by `interaction`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.backbone import MAX_UNROLLED_LAYERS, REMAT, Layer
from jaxtml.model.layers import RMSNorm, project
from jaxtml.model.placement import SINGLE_DEVICE, Placement, all_gather_parameters
from jaxtml.model.spec import Params, Released, bind, normal, param
from jaxtml.model.stack import LayerBlock, LayerKind, LayerStack
from jaxtml.model.vocabulary import Scores

NAME = "model.mtp.layers.{layer}"


class Head(nnx.Module):
    """Both inputs normed and projected together, then one dense layer of the backbone's."""

    def __init__(self, config: BackboneConfig, kind: LayerKind, placement: Placement = SINGLE_DEVICE):
        d = config.d_model
        self.hidden_norm = RMSNorm(d, config.norm_eps, "embed", f"{NAME}.hidden_norm.weight")
        self.embed_norm = RMSNorm(d, config.norm_eps, "embed", f"{NAME}.embed_norm.weight")
        self.input_proj = param(
            (2, d, d),  # for the hidden state, for the embedding
            ("pair", "embed", "merged"),
            normal(config.init_std),
            released=Released(f"{NAME}.input_proj.weight", (d, 2 * d), (1, 2, 0), (d, 2, d)),
        )
        self.layer = Layer(config, kind, placement, f"{NAME}.transformer_block")

    def __call__(self, hidden: jax.Array, ahead: jax.Array) -> jax.Array:
        """`hidden` and `ahead` `[B, T, D]` -> the next head's hidden state `[B, T, D]`."""
        weights = self.input_proj[...].astype(hidden.dtype)
        joined = project(self.hidden_norm(hidden), weights[0]) + project(self.embed_norm(ahead), weights[1])
        return self.layer(joined)[0]


class MTP(LayerStack):
    """The chain of heads as a pure function over stacked parameters."""

    def __init__(self, config: BackboneConfig, placement: Placement = SINGLE_DEVICE):
        self.mesh = placement.mesh
        kinds = [LayerKind(i in config.mtp_global, is_moe=False) for i in range(config.mtp_heads)]
        super().__init__(kinds, lambda kind: Head(config, kind, placement))

    def specs(self) -> dict[str, Any]:
        """The table of a `LayerStack`; no token that is served uses any of it."""
        return jax.tree.map(lambda spec: dataclasses.replace(spec, active=0.0), super().specs())

    def predict(
        self,
        params: Params,
        hidden: jax.Array,
        embedded: jax.Array,
        target: jax.Array,
        score: Callable[[jax.Array, jax.Array], Scores],
        remat: str = "none",
    ) -> Scores:
        """What each head makes of a batch.

        Args:
          params: of this stack.
          hidden: `[B, T, D]` of the backbone, normed.
          embedded: `[B, T, D]`, what it read.
          target: `[B, T]` int32, what its own positions are to foresee.
          score: (`[B, T, D]`, `[B, T]`) -> `[B, T]` each.
          remat: see `TrainConfig.remat`.

        Returns:
          `[H, B, T]` each; head d's position i is about `target[:, i + d + 1]`, the last d + 1 about nothing.
        """
        heads, tokens = len(self.kinds()), hidden.shape[1]
        beyond = ((0, 0), (0, heads))
        embedded, target = jnp.pad(embedded, (*beyond, (0, 0))), jnp.pad(target, beyond)
        unroll = heads <= MAX_UNROLLED_LAYERS
        found: list[Any] = []
        for b, block in enumerate(self.blocks):

            def body(hidden: jax.Array, given: Any, block: LayerBlock = block) -> tuple[jax.Array, Any]:
                weights, first = given
                parts = []
                for r, run in enumerate(block.runs):

                    @REMAT[remat]
                    def head(hidden: jax.Array, layer: Params, later: jax.Array, of: LayerKind = run.kind) -> jax.Array:
                        layer = all_gather_parameters(layer, self.tables[of], self.mesh, hidden.dtype)
                        ahead = jax.lax.dynamic_slice_in_dim(embedded, later, tokens, axis=1)
                        return bind(self.modules[of], layer)(hidden, ahead)

                    def one(hidden: jax.Array, given: Any, head: Any = head) -> tuple[jax.Array, Scores]:
                        layer, later = given
                        hidden = head(hidden, layer, later)
                        return hidden, score(hidden, jax.lax.dynamic_slice_in_dim(target, later, tokens, axis=1))

                    later = first + sum(run.layers for run in block.runs[:r]) + jnp.arange(run.layers)
                    hidden, scores = jax.lax.scan(one, hidden, (weights[f"run{r}"], later), unroll=unroll)
                    parts.append(scores)
                return hidden, jax.tree.map(lambda *of_runs: jnp.concatenate(of_runs), *parts)

            first = block.first + 1 + block.layers * jnp.arange(block.repeats)
            hidden, scores = jax.lax.scan(body, hidden, (params[f"block{b}"], first), unroll=unroll)
            found.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scores))
        return jax.tree.map(lambda *of_blocks: jnp.concatenate(of_blocks), *found)
