"""Multi-token prediction: a chain of heads, each of which predicts one position further ahead (DeepSeek-V3, 2024).

Axes: B batch, T positions, D model width, H heads. The heads add a term to the training loss; serving does not read
them. Called by `interaction`.

Head d has two inputs at position i. The first is a hidden state: that of the backbone after its final norm, or that of
the head before. The second is position i + d + 1, embedded as the backbone reads it. The output of the head's layer is
scored with the model's own unembedding, without another norm, against the target of position i + d + 1. The released
heads are wired like this, according to `vllm` and to measurements on the released weights. (`transformers` 5.24 leaves
out the norm of the embedding.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.backbone import MAX_UNROLLED_LAYERS, REMAT, Layer
from jaxtml.model.layers import RMSNorm, project
from jaxtml.model.placement import SINGLE_DEVICE, Placement, all_gather_parameters
from jaxtml.model.spec import Params, Released, SpecTable, bind, normal, param
from jaxtml.model.stack import LayerBlock, LayerKind, LayerStack
from jaxtml.model.vocabulary import Scores

_RELEASED_PREFIX = "model.mtp.layers.{layer}"


class Head(nnx.Module):
    """One head: norms both inputs, projects them together, and runs one dense layer like the backbone's."""

    def __init__(self, config: BackboneConfig, kind: LayerKind, placement: Placement = SINGLE_DEVICE):
        d = config.d_model
        self.hidden_norm = RMSNorm(d, config.norm_eps, "embed", f"{_RELEASED_PREFIX}.hidden_norm.weight")
        self.embed_norm = RMSNorm(d, config.norm_eps, "embed", f"{_RELEASED_PREFIX}.embed_norm.weight")
        self.input_proj = param(
            (2, d, d),  # first for the hidden state, then for the embedding
            ("pair", "embed", "merged"),
            normal(config.init_std),
            released=Released(f"{_RELEASED_PREFIX}.input_proj.weight", (d, 2 * d), (1, 2, 0), (d, 2, d)),
        )
        self.layer = Layer(config, kind, placement, f"{_RELEASED_PREFIX}.transformer_block")

    def __call__(self, hidden: jax.Array, ahead: jax.Array) -> jax.Array:
        """Returns the next head's hidden state `[B, T, D]`.

        Args:
          hidden: `[B, T, D]`, the hidden state of the backbone or of the head before.
          ahead: `[B, T, D]`, the embedded positions further ahead.
        """
        weights = self.input_proj[...].astype(hidden.dtype)
        joined = project(self.hidden_norm(hidden), weights[0]) + project(self.embed_norm(ahead), weights[1])
        return self.layer(joined)[0]


class MTP(LayerStack):
    """The chain of heads, as a pure function of stacked parameters."""

    def __init__(self, config: BackboneConfig, placement: Placement = SINGLE_DEVICE):
        self.mesh = placement.mesh
        kinds = [LayerKind(i in config.mtp_global, is_moe=False) for i in range(config.mtp_heads)]
        super().__init__(kinds, lambda kind: Head(config, kind, placement))

    def specs(self) -> SpecTable:
        """Returns the table of a `LayerStack` with `active` set to 0, because a token that is served uses no head."""
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
        """Scores the predictions of every head for a batch.

        Args:
          params: the parameters of this stack.
          hidden: `[B, T, D]`, the normed hidden states of the backbone.
          embedded: `[B, T, D]`, the embedded positions that the backbone read.
          target: `[B, T]` int32, the target of each position of the backbone.
          score: scores hidden states `[B, T, D]` against targets `[B, T]`.
          remat: see `TrainConfig.remat`.

        Returns:
          Scores of `[H, B, T]`. Position i of head d scores the prediction of `target[:, i + d + 1]`. The last d + 1
          positions of head d have no meaning.
        """
        heads, tokens = len(self.kinds()), hidden.shape[1]
        padding = ((0, 0), (0, heads))
        embedded, target = jnp.pad(embedded, (*padding, (0, 0))), jnp.pad(target, padding)
        unroll = heads <= MAX_UNROLLED_LAYERS
        scores: list[Scores] = []
        for b, block in enumerate(self.blocks):

            def run_block(
                hidden: jax.Array, inputs: tuple[Params, jax.Array], block: LayerBlock = block
            ) -> tuple[jax.Array, Scores]:
                weights, first = inputs
                block_scores = []
                for r, run in enumerate(block.runs):

                    @REMAT[remat]
                    def run_head(
                        hidden: jax.Array, layer: Params, offset: jax.Array, kind: LayerKind = run.kind
                    ) -> jax.Array:
                        layer = all_gather_parameters(layer, self.tables[kind], self.mesh, hidden.dtype)
                        ahead = jax.lax.dynamic_slice_in_dim(embedded, offset, tokens, axis=1)
                        return bind(self.modules[kind], layer)(hidden, ahead)

                    def score_head(
                        hidden: jax.Array,
                        inputs: tuple[Params, jax.Array],
                        run_head: Callable[..., jax.Array] = run_head,
                    ) -> tuple[jax.Array, Scores]:
                        layer, offset = inputs
                        hidden = run_head(hidden, layer, offset)
                        return hidden, score(hidden, jax.lax.dynamic_slice_in_dim(target, offset, tokens, axis=1))

                    # Head d reads and predicts at an offset of d + 1.
                    offsets = first + sum(run.layers for run in block.runs[:r]) + jnp.arange(run.layers)
                    hidden, run_scores = jax.lax.scan(score_head, hidden, (weights[f"run{r}"], offsets), unroll=unroll)
                    block_scores.append(run_scores)
                return hidden, jax.tree.map(lambda *of_runs: jnp.concatenate(of_runs), *block_scores)

            first = block.first + 1 + block.layers * jnp.arange(block.repeats)
            hidden, block_scores = jax.lax.scan(run_block, hidden, (params[f"block{b}"], first), unroll=unroll)
            scores.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), block_scores))
        return jax.tree.map(lambda *of_blocks: jnp.concatenate(of_blocks), *scores)
