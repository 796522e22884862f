"""The interaction model: input embeddings, backbone and output heads, and the forward pass over whole sequences.

Axes: B batch, T positions, D model width, V vocabulary, P patches, H prediction heads, C clock features.

`InteractionModel` holds shapes only. Parameters are a plain nested dict whose table is `specs`, and every method is a
pure function of them. Called by the trainer, by checks (`jaxtml logits`) and by `duplex.step`. The latter runs the same
parts for one micro-turn at a time. A micro-turn is 200 ms of input and output.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import Config
from jaxtml.model.backbone import Backbone
from jaxtml.model.draft import Drafter
from jaxtml.model.experts.routing import MoEStats
from jaxtml.model.layers import RMSNorm
from jaxtml.model.mtp import MTP
from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement, all_gather_parameters
from jaxtml.model.spec import Params, ParamSpec, SpecTable, bind, linear, normal, param, specs, zeros
from jaxtml.model.speech import vocoder
from jaxtml.model.speech.flow import FlowHead
from jaxtml.model.towers import HMLP, ClockTower, DmelTower, TextEmbedding
from jaxtml.model.vocabulary import Scores, score_targets
from jaxtml.parallel.collectives import all_gather_last, psum_backward
from jaxtml.stream.tokens import PositionKind

_GROUP_OF_PART = {
    "embed": "embedding",
    "unembed": "unembedding",
    "audio": "towers",
    "visual": "towers",
    "flow": "flow head",
    "draft": "drafter",
    "vocoder": "vocoder",
    "clock": "micro-turn",
    "own": "micro-turn",
    "mtp": "prediction heads",
}
_OUTSIDE_TRUNK = ("layers", "mtp", "vocoder")  # the parts of the parameter tree that `Trunk` does not declare


def group_of(path: str, spec: ParamSpec) -> str:
    """Returns the group in which a parameter is counted for display, such as "attention" or "routed experts"."""
    parts = path.split("/")
    if parts[0] in _GROUP_OF_PART:
        return _GROUP_OF_PART[parts[0]]
    if "attn" in parts:
        return "attention"
    for axis, name in (("expert", "routed experts"), ("shared", "shared experts"), ("router", "router")):
        if axis in spec.axes:
            return name
    return "dense feed-forward" if "mlp" in spec.axes else "norms, convolutions, scales"


class Inputs(NamedTuple):
    """A batch of sequences as the model reads them (see `jaxtml.stream.layout.EncodedConversation`).

    Attributes:
      kind: `[B, T]` uint8, the `PositionKind` of each position.
      ids: `[B, T]` int32, token ids.
      bins: `[B, T, 80]` uint8, dMel bins; read at USER and OWN positions.
      clock: `[B, T, C]` float32, clock features; read at TURN positions.
      patches: `[B, P, 2, 40, 40, 3]` float32, in the order of the PATCH positions; P may be 0.
    """

    kind: jax.Array
    ids: jax.Array
    bins: jax.Array
    clock: jax.Array
    patches: jax.Array


class Trunk(nnx.Module):
    """Everything around the layers: the embeddings before them, and the final norm and heads after them."""

    def __init__(self, config: Config, placement: Placement = SINGLE_DEVICE):
        b = config.backbone
        self.embed = TextEmbedding(b, placement)
        self.audio = DmelTower(b)
        self.visual = HMLP(config.vision, b)
        self.clock = ClockTower(b)
        # Added to frames of the model's own speech, so that they differ from the user's frames. Starts at zero, and so
        # does not change a model that begins with the released weights.
        self.own = param((b.d_model,), ("embed",), zeros)
        self.norm = RMSNorm(b.d_model, b.norm_eps, "embed", "model.llm.norm.weight")
        self.unembed = param(
            (b.d_model, b.vocab_size),
            ("embed", "vocab"),
            normal(b.init_std),
            released=linear("model.llm.unembed.weight", b.d_model, b.vocab_size),
        )
        self.flow = FlowHead(config.flow, b.d_model)
        if config.duplex.draft:
            self.draft = Drafter(b)


class InteractionModel:
    """The model of one config on one placement: shapes and pure functions, no arrays."""

    def __init__(self, config: Config, placement: Placement = SINGLE_DEVICE):
        self.config = config
        self.placement = placement
        self.trunk = Trunk(config, placement)
        self.backbone = Backbone(config.backbone, placement)
        self.mtp = MTP(config.backbone, placement) if config.backbone.mtp_heads else None

    def specs(self) -> SpecTable:
        """Returns the spec table of all parameters."""
        return {**self.serving_specs(), **({} if self.mtp is None else {"mtp": self.mtp.specs()})}

    def serving_specs(self) -> SpecTable:
        """Returns the part of `specs` that serving reads: all parameters except the prediction heads."""
        return {
            **specs(self.trunk),
            "layers": self.backbone.specs(),
            "vocoder": vocoder.param_specs(self.config.vocoder),
        }

    def all_gather_trunk(self, params: Params, dtype: jnp.dtype) -> Params:
        """Gathers the trunk's parameters on a mesh; returns the complete tree.

        Layers, prediction heads and the unembedding are not gathered here: each is gathered piece by piece where it is
        used.
        """
        gathered_later = {name: params[name] for name in (*_OUTSIDE_TRUNK, "unembed") if name in params}
        table = {name: part for name, part in specs(self.trunk).items() if name not in gathered_later}
        trunk = {name: params[name] for name in table}
        return {**all_gather_parameters(trunk, table, self.placement.mesh, dtype), **gathered_later}

    def bind(self, params: Params) -> Trunk:
        """Returns the trunk with its part of `params`."""
        return bind(self.trunk, {k: v for k, v in params.items() if k not in _OUTSIDE_TRUNK})

    def embed(self, params: Params, inputs: Inputs, dtype: jnp.dtype) -> jax.Array:
        """Embeds positions of every kind: `[B, T, D]`, zero at PAD positions."""
        trunk = self.bind(params)
        kind = inputs.kind[..., None]
        x = trunk.embed(inputs.ids, dtype)
        x = x + jnp.where(kind == PositionKind.TURN, trunk.clock(inputs.clock, dtype), 0)
        frames = trunk.audio(inputs.bins, dtype)
        frames = frames + jnp.where(kind == PositionKind.OWN, trunk.own[...].astype(dtype), 0)
        is_frame = (kind == PositionKind.USER) | (kind == PositionKind.OWN)
        x = jnp.where(is_frame, frames, x)
        batch, patches = inputs.patches.shape[:2]
        if patches:
            flat = inputs.patches.reshape(batch * patches, *inputs.patches.shape[2:])
            visual = trunk.visual(flat, dtype).reshape(batch, patches, -1)
            is_patch = inputs.kind == PositionKind.PATCH
            order = jnp.clip(jnp.cumsum(is_patch, axis=1) - 1, 0, patches - 1)
            x = jnp.where(is_patch[..., None], jnp.take_along_axis(visual, order[..., None], axis=1), x)
        return jnp.where(kind == PositionKind.PAD, 0, x).astype(dtype)

    def hidden(
        self, params: Params, inputs: Inputs, dtype: jnp.dtype, remat: str = "none"
    ) -> tuple[jax.Array, list[MoEStats]]:
        """Returns the normed hidden states `[B, T, D]` of whole sequences, and the stats of the experts.

        `remat` says what the backward pass computes again; see `TrainConfig.remat`.
        """
        return self.hidden_from_embedded(params, self.embed(params, inputs, dtype), inputs.kind, remat)

    def hidden_from_embedded(
        self, params: Params, embedded: jax.Array, kind: jax.Array, remat: str = "none"
    ) -> tuple[jax.Array, list[MoEStats]]:
        """Returns the same as `hidden`, from positions that are already embedded: `[B, T, D]`, with `kind` `[B, T]`."""
        x, stats = self.backbone.forward(params["layers"], embedded, kind, remat)
        return self.bind(params).norm(x), stats

    def scores(self, params: Params, hidden: jax.Array, target: jax.Array) -> Scores:
        """Scores the target tokens `[B, T]` int32 from `hidden` `[B, T, D]`; both fields of the result are `[B, T]`."""
        b, mesh = self.config.backbone, self.placement.mesh
        table = specs(self.trunk)["unembed"]

        def fetch(columns: jax.Array) -> jax.Array:
            return all_gather_parameters({"": columns}, {"": table}, mesh, hidden.dtype)[""].astype(hidden.dtype)

        flat = (hidden / b.logits_divisor).reshape(-1, b.d_model)
        flat_scores = score_targets(flat, params["unembed"], target.reshape(-1), mesh, fetch)
        return Scores(*(part.reshape(target.shape) for part in flat_scores))

    def mtp_scores(
        self, params: Params, hidden: jax.Array, embedded: jax.Array, target: jax.Array, remat: str = "none"
    ) -> Scores:
        """Scores the predictions of the H heads; both fields of the result are `[H, B, T]` (see `mtp.MTP.predict`)."""
        assert self.mtp is not None

        def score(hidden: jax.Array, target: jax.Array) -> Scores:
            return self.scores(params, hidden, target)

        return self.mtp.predict(params["mtp"], hidden, embedded, target, score, remat)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns text logits `[..., V]` float32 from normed hidden states `[..., D]`.

        The padding of the vocabulary has logits too: control tokens have their ids there.
        """
        scaled = psum_backward(hidden / self.config.backbone.logits_divisor, self.placement.mesh, TENSOR)
        logits = (scaled @ params["unembed"].astype(hidden.dtype)).astype(jnp.float32)
        return all_gather_last(logits, self.placement.mesh, TENSOR)
