"""The decoder: layers grouped into periodic blocks, stacked and scanned; unrolled over a cache for serving.

Axes: B batch, T tokens, D model width, W convolution kernel. Parameters of block b, run r lie under
`block{b}/run{r}/...` with two leading dimensions `[repeats, layers]`: a run is `layers` equal layers in a row, a block
is a sequence of runs that occurs `repeats` times. 42 layers of Inkling-Small compile as five layer bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtml.config import AttentionConfig, BackboneConfig
from jaxtml.model.attention import Attention, KVCache, Step, make_step, ring_slots
from jaxtml.model.layers import DenseMLP, RMSNorm, ShortConv
from jaxtml.model.moe import MoE, MoEStats
from jaxtml.model.placement import ALONE, Placement, whole
from jaxtml.model.spec import Params, bind, specs, stack

# Layers up to which a training program spells them out: a loop writes what its gradient needs into one stacked array
# and reads it back, which costs a small model 6 % of a step.
SPELT_OUT = 8


# What a layer's forward pass keeps for the backward one, see `TrainConfig.remat`.
_KEPT = jax.checkpoint_policies.save_only_these_names("attention", "feed_forward")
_REMAT: dict[str, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "outputs": partial(jax.checkpoint, policy=_KEPT),
    "full": jax.checkpoint,
}


class Kind(NamedTuple):
    """What distinguishes one layer from another."""

    is_global: bool
    is_moe: bool


class Run(NamedTuple):
    """`layers` equal layers in a row."""

    kind: Kind
    layers: int


class Block(NamedTuple):
    """A sequence of runs that occurs `repeats` times; `first` is the index of its first layer."""

    runs: tuple[Run, ...]
    repeats: int
    first: int

    @property
    def layers(self) -> int:
        return sum(run.layers for run in self.runs)


def layout(config: BackboneConfig) -> tuple[Block, ...]:
    """Groups the layers: an irregular beginning, then the period that leaves the fewest bodies to compile."""
    kinds = [Kind(i in config.global_layers, i >= config.n_dense) for i in range(config.n_layers)]
    best = (Block(_runs(kinds), 1, 0),)
    for prefix in range(len(kinds)):
        rest = kinds[prefix:]
        for period in range(1, len(rest) // 2 + 1):
            if len(rest) % period or rest[period:] != rest[:-period]:
                continue
            tail = Block(_runs(rest[:period]), len(rest) // period, prefix)
            head = (Block(_runs(kinds[:prefix]), 1, 0),) if prefix else ()
            if _bodies((*head, tail)) < _bodies(best):
                best = (*head, tail)
    return best


def _runs(kinds: list[Kind]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for kind in kinds:
        if runs and runs[-1].kind == kind:
            runs[-1] = Run(kind, runs[-1].layers + 1)
        else:
            runs.append(Run(kind, 1))
    return tuple(runs)


def _bodies(blocks: tuple[Block, ...]) -> int:
    return sum(len(block.runs) for block in blocks)


class LayerState(NamedTuple):
    """What one layer remembers of each session: keys and values, and four convolution tails `[B, W - 1, C]`."""

    cache: KVCache
    k_tail: jax.Array
    v_tail: jax.Array
    attn_tail: jax.Array
    mlp_tail: jax.Array


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each followed by a short convolution and the residual."""

    def __init__(self, config: BackboneConfig, kind: Kind, placement: Placement = ALONE):
        prefix = "model.llm.layers.{layer}"
        self.kind = kind
        attention = config.global_ if kind.is_global else config.sliding
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps, "embed", f"{prefix}.attn_norm.weight")
        self.attn = Attention(config, attention, kind.is_global, f"{prefix}.attn", placement)
        self.attn_conv = ShortConv(config.d_model, config.conv_kernel, "channel", f"{prefix}.attn_sconv.weight")
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, "embed", f"{prefix}.mlp_norm.weight")
        if kind.is_moe:
            self.mlp = MoE(config, f"{prefix}.mlp", placement)
        else:
            self.mlp = DenseMLP(config.d_model, config.d_ff_dense, config.init_std, f"{prefix}.mlp", placement)
        self.mlp_conv = ShortConv(config.d_model, config.conv_kernel, "channel", f"{prefix}.mlp_sconv.weight")

    def __call__(
        self, x: jax.Array, kind: jax.Array | None = None, step: Step | None = None, state: LayerState | None = None
    ) -> tuple[jax.Array, LayerState | None, MoEStats | None]:
        """One layer over `x` `[B, T, D]`; with `step` and `state` it continues sessions, else it sees it all.

        `kind` `[B, T]` is what stands at each position (`PositionKind`), for the stats.
        """
        length = step.length if step is not None else None
        cache, tails = (state.cache, (state.k_tail, state.v_tail)) if state is not None else (None, None)
        y, cache, tails = self.attn(self.attn_norm(x), step, cache, tails)
        y = checkpoint_name(y, "attention")
        y, attn_tail = self.attn_conv(y, state.attn_tail if state is not None else None, length)
        x = x + y
        y = self.mlp_norm(x)
        stats = None
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(y, kind)
        else:
            y = self.mlp(y)
        y = checkpoint_name(y, "feed_forward")
        y, mlp_tail = self.mlp_conv(y, state.mlp_tail if state is not None else None, length)
        x = x + y
        if cache is None:
            return x, None, stats
        return x, LayerState(cache, *tails, attn_tail, mlp_tail), stats


class Backbone:
    """The stack of layers as pure functions over stacked parameters. Holds shapes, never arrays."""

    def __init__(self, config: BackboneConfig, placement: Placement = ALONE):
        self.config = config
        self.placement = placement
        self.blocks = layout(config)
        kinds = {run.kind for block in self.blocks for run in block.runs}
        self.modules = {kind: Layer(config, kind, placement) for kind in sorted(kinds)}
        self.tables = {kind: specs(module) for kind, module in self.modules.items()}

    def specs(self) -> dict[str, Any]:
        """Spec table `{block: {run: {...}}}` with `[repeats, layers]` in front of every shape."""
        return {
            f"block{b}": {
                f"run{r}": stack(self.tables[run.kind], (block.repeats, run.layers), ("block", "layer"))
                for r, run in enumerate(block.runs)
            }
            for b, block in enumerate(self.blocks)
        }

    def layer_index(self, block: int, run: int, repeat: int, layer: int) -> int:
        """Index, in the order of execution, of one layer of the stack."""
        b = self.blocks[block]
        return b.first + repeat * b.layers + sum(r.layers for r in b.runs[:run]) + layer

    def sequence(
        self, params: Params, x: jax.Array, kind: jax.Array | None = None, remat: str = "none"
    ) -> tuple[jax.Array, list[MoEStats]]:
        """All layers over whole sequences `x` `[B, T, D]`, scanned; `remat` says what is computed again backwards.

        `kind` `[B, T]` is what stands at each position, PAD where nothing does (None: text everywhere).

        Returns the hidden states before the final norm and, per MoE run, stats stacked `[repeats, layers, ...]`.
        """
        stats: list[MoEStats] = []
        unroll = self.config.n_layers <= SPELT_OUT
        for b, block in enumerate(self.blocks):

            def body(x: jax.Array, weights: Params, block: Block = block) -> tuple[jax.Array, list[Any]]:
                collected = []
                for r, run in enumerate(block.runs):

                    def one(x: jax.Array, layer: Params, of: Kind = run.kind) -> tuple[jax.Array, Any]:
                        layer = whole(layer, self.tables[of], self.placement.mesh, x.dtype)
                        x, _, stat = bind(self.modules[of], layer)(x, kind)
                        return x, stat

                    layers = weights[f"run{r}"]
                    x, stat = jax.lax.scan(_REMAT[remat](one), x, layers, unroll=unroll)
                    collected.append(stat)
                return x, collected

            x, collected = jax.lax.scan(body, x, params[f"block{b}"], unroll=unroll)
            stats += [stat for stat in collected if stat is not None]
        return x, stats

    def unstack(self, params: Params) -> list[Params]:
        """Per-layer parameters in the order of execution: what serving reads (no per-step slicing of the stack)."""
        layers: list[Params] = [{}] * self.config.n_layers
        for b, block in enumerate(self.blocks):
            for r, run in enumerate(block.runs):
                for i in range(block.repeats):
                    for j in range(run.layers):
                        stacked = params[f"block{b}"][f"run{r}"]
                        layers[self.layer_index(b, r, i, j)] = jax.tree.map(lambda a, i=i, j=j: a[i, j], stacked)
        return layers

    def kinds(self) -> list[Kind]:
        """The kind of each layer in the order of execution."""
        return [
            run.kind
            for block in self.blocks
            for _ in range(block.repeats)
            for run in block.runs
            for _ in range(run.layers)
        ]

    def init_state(self, batch: int, max_tokens: int, dtype: jnp.dtype) -> list[LayerState]:
        """Empty state of `batch` sessions for calls of at most `max_tokens` tokens."""
        c = self.config
        past = c.conv_kernel - 1

        def one(kind: Kind) -> LayerState:
            a = self._attention(kind)
            slots = ring_slots(a, max_tokens)
            channels = a.n_kv_heads * a.head_dim
            return LayerState(
                KVCache(
                    jnp.zeros((batch, a.n_kv_heads, a.head_dim, slots), dtype),
                    jnp.zeros((batch, a.n_kv_heads, slots, a.head_dim), dtype),
                ),
                *(jnp.zeros((batch, past, n), jnp.float32) for n in (channels, channels, c.d_model, c.d_model)),
            )

        return [one(kind) for kind in self.kinds()]

    def continue_(
        self, layers: list[Params], x: jax.Array, state: list[LayerState], position: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, list[LayerState]]:
        """All layers over T tokens that continue sessions.

        Args:
          layers: from `unstack`.
          x: `[B, T, D]`, real tokens left-aligned.
          state: from `init_state` or the previous call.
          position: `[B]` int32, tokens of each session so far.
          length: `[B]` int32, real tokens among the T.
        """
        tokens = x.shape[1]
        steps: dict[bool, Step] = {}
        present = (jnp.arange(tokens) < length[:, None]).astype(jnp.int32)
        new_state = []
        for kind, params, old in zip(self.kinds(), layers, state, strict=True):
            if kind.is_global not in steps:
                slots = old.cache.k.shape[-1]
                steps[kind.is_global] = make_step(self._attention(kind), slots, position, length, tokens)
            x, new, _ = bind(self.modules[kind], params)(x, present, steps[kind.is_global], old)
            new_state.append(new)
        return x, new_state

    def _attention(self, kind: Kind) -> AttentionConfig:
        return self.config.global_ if kind.is_global else self.config.sliding
