"""The decoder: a `stack` of layers, scanned; unrolled over a cache for serving.

Axes: B batch, T tokens, D model width, W convolution kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxtml.config import AttentionConfig, BackboneConfig
from jaxtml.model.attention.attention import Attention
from jaxtml.model.attention.cache import CacheStep, KVCache, plan_cache_step, ring_slots
from jaxtml.model.experts.moe import MoE
from jaxtml.model.experts.routing import MoEStats
from jaxtml.model.layers import DenseMLP, RMSNorm, ShortConv
from jaxtml.model.placement import SINGLE_DEVICE, Placement, all_gather_parameters
from jaxtml.model.spec import Params, bind
from jaxtml.model.stack import LayerBlock, LayerKind, LayerRun, LayerStack

# Layers up to which a training program spells them out: a loop writes what its gradient needs into one stacked array
# and reads it back, which costs a small model 6 % of a step.
MAX_UNROLLED_LAYERS = 8


# What a layer's forward pass keeps for the backward one, see `TrainConfig.remat`.
_KEPT = jax.checkpoint_policies.save_only_these_names("attention", "feed_forward")
REMAT: dict[str, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "outputs": partial(jax.checkpoint, policy=_KEPT),
    "full": jax.checkpoint,
}


class LayerState(NamedTuple):
    """What a layer, or a stack of layers, remembers of each session: keys and values, and four convolution tails
    `[*stack, B, W - 1, C]`."""

    cache: KVCache
    k_tail: jax.Array
    v_tail: jax.Array
    attn_tail: jax.Array
    mlp_tail: jax.Array


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each followed by a short convolution and the residual."""

    def __init__(
        self,
        config: BackboneConfig,
        kind: LayerKind,
        placement: Placement = SINGLE_DEVICE,
        prefix: str = "model.llm.layers.{layer}",
    ):
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
        self,
        x: jax.Array,
        kind: jax.Array | None = None,
        step: CacheStep | None = None,
        state: LayerState | None = None,
        at: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, LayerState | None, MoEStats | None]:
        """One layer over `x` `[B, T, D]`; with `step` and `state` it continues sessions, else it sees it all.

        `kind` `[B, T]` is what stands at each position (`PositionKind`), for the stats. `at` is the layer's place where
        `state` and the routed experts are those of a stack.
        """
        length = step.length if step is not None else None
        cache = state.cache if state is not None else None
        k_tail, v_tail, attn_tail, mlp_tail = (t[at] for t in state[1:]) if state is not None else (None,) * 4
        tails = (k_tail, v_tail) if k_tail is not None and v_tail is not None else None
        y, cache, tails = self.attn(self.attn_norm(x), step, cache, tails, at)
        y = checkpoint_name(y, "attention")
        y, attn_tail = self.attn_conv(y, attn_tail, length)
        x = x + y
        y = self.mlp_norm(x)
        stats = None
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(y, kind, at, skip_padding=step is not None)
        else:
            y = self.mlp(y)
        y = checkpoint_name(y, "feed_forward")
        y, mlp_tail = self.mlp_conv(y, mlp_tail, length)
        x = x + y
        if cache is None or state is None:
            return x, None, stats
        new = (*tails, attn_tail, mlp_tail)
        if at:
            new = (old.at[at].set(tail) for old, tail in zip(state[1:], new, strict=True))
        return x, LayerState(cache, *new), stats


class Backbone(LayerStack):
    """The layers as pure functions over stacked parameters."""

    def __init__(self, config: BackboneConfig, placement: Placement = SINGLE_DEVICE):
        self.config = config
        self.placement = placement
        kinds = [LayerKind(i in config.global_layers, i >= config.n_dense) for i in range(config.n_layers)]
        super().__init__(kinds, lambda kind: Layer(config, kind, placement))

    def forward(
        self, params: Params, x: jax.Array, kind: jax.Array | None = None, remat: str = "none"
    ) -> tuple[jax.Array, list[MoEStats]]:
        """All layers over whole sequences `x` `[B, T, D]`, scanned; `remat` says what is computed again backwards.

        `kind` `[B, T]` is what stands at each position, PAD where nothing does (None: text everywhere).

        Returns the hidden states before the final norm and, per MoE run, stats stacked `[repeats, layers, ...]`.
        """
        stats: list[MoEStats] = []
        unroll = self.config.n_layers <= MAX_UNROLLED_LAYERS
        for b, block in enumerate(self.blocks):

            def body(x: jax.Array, weights: Params, block: LayerBlock = block) -> tuple[jax.Array, list[Any]]:
                collected = []
                for r, run in enumerate(block.runs):

                    def one(x: jax.Array, layer: Params, of: LayerKind = run.kind) -> tuple[jax.Array, Any]:
                        layer = all_gather_parameters(layer, self.tables[of], self.placement.mesh, x.dtype)
                        x, _, stat = bind(self.modules[of], layer)(x, kind)
                        return x, stat

                    layers = weights[f"run{r}"]
                    x, stat = jax.lax.scan(REMAT[remat](one), x, layers, unroll=unroll)
                    collected.append(stat)
                return x, collected

            x, collected = jax.lax.scan(body, x, params[f"block{b}"], unroll=unroll)
            stats += [stat for stat in collected if stat is not None]
        return x, stats

    @property
    def unrolled(self) -> bool:
        """Whether serving has every layer by itself: a loop cuts each layer's weights out of the stack, which costs a
        small model time, and a large one the time to compile if it does not."""
        return self.config.n_layers <= MAX_UNROLLED_LAYERS and self.placement.mesh.devices == 1

    def prepare_for_serving(self, params: Params) -> Any:
        """The layers' parameters as `forward_cached` takes them: in the order of execution where they are spelt out."""
        if not self.unrolled:
            return params
        layers: list[Params] = [{}] * self.config.n_layers
        for b, block in enumerate(self.blocks):
            for r, run in enumerate(block.runs):
                for i in range(block.repeats):
                    for j in range(run.layers):
                        stacked = params[f"block{b}"][f"run{r}"]
                        layers[self.layer_index(b, r, i, j)] = jax.tree.map(lambda a, i=i, j=j: a[i, j], stacked)
        return layers

    def init_state(self, batch: int, max_tokens: int, dtype: jnp.dtype) -> Any:
        """Empty state of `batch` sessions for calls of at most `max_tokens` tokens: a list of `LayerState`, or, where
        layers are not spelt out, one per run in a list per block."""
        c = self.config
        past = c.conv_kernel - 1

        def one(kind: LayerKind, stack: tuple[int, ...] = ()) -> LayerState:
            a = self._attention(kind.is_global)
            slots = ring_slots(a, max_tokens)
            channels = a.n_kv_heads * a.head_dim
            return LayerState(
                KVCache(
                    jnp.zeros((*stack, batch, a.n_kv_heads, a.head_dim, slots), dtype),
                    jnp.zeros((*stack, batch, a.n_kv_heads, slots, a.head_dim), dtype),
                ),
                *(jnp.zeros((*stack, batch, past, n), jnp.float32) for n in (channels, channels, c.d_model, c.d_model)),
            )

        if self.unrolled:
            return [one(kind) for kind in self.kinds()]
        return [[one(run.kind, (block.repeats, run.layers)) for run in block.runs] for block in self.blocks]

    def state_partition_specs(self, sessions: tuple[str, ...]) -> Any:
        """A `PartitionSpec` for each array of `init_state` on a mesh whose axes `sessions` split the batch."""
        heads, channels, alike = (
            PartitionSpec(None, None, sessions, *rest) for rest in (("tensor",), (None, "tensor"), ())
        )
        one = (heads, heads, channels, channels, alike, alike)  # the leaves of a LayerState
        structure = jax.tree.structure(jax.eval_shape(lambda: self.init_state(1, 1, jnp.float32)))
        return jax.tree.unflatten(structure, one * (structure.num_leaves // len(one)))

    def forward_cached(
        self, layers: Any, x: jax.Array, state: Any, position: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, Any]:
        """All layers over T tokens that continue sessions.

        Args:
          layers: from `prepare_for_serving`.
          x: `[B, T, D]`, real tokens left-aligned.
          state: from `init_state` or the previous call.
          position: `[B]` int32, tokens of each session so far.
          length: `[B]` int32, real tokens among the T.
        """
        tokens = x.shape[1]
        present = (jnp.arange(tokens) < length[:, None]).astype(jnp.int32)
        steps = {
            is_global: plan_cache_step(self._attention(is_global), slots, position, length, tokens)
            for is_global, slots in self._slots(state).items()
        }
        if self.unrolled:
            new_state = []
            for kind, params, old in zip(self.kinds(), layers, state, strict=True):
                x, new, _ = bind(self.modules[kind], params)(x, present, steps[kind.is_global], old)
                new_state.append(new)
            return x, new_state
        new_state = []
        for b, (block, old) in enumerate(zip(self.blocks, state, strict=True)):
            weights = layers[f"block{b}"]

            def body(carry: Any, i: jax.Array, block: LayerBlock = block, weights: Any = weights) -> tuple[Any, None]:
                x, states = carry
                after = []
                for r, (run, state) in enumerate(zip(block.runs, states, strict=True)):

                    def one(carry: Any, j: jax.Array, run: LayerRun = run, held: Any = weights[f"run{r}"]) -> Any:
                        x, state = carry
                        params = self._layer(run.kind, held, (i, j))
                        step = steps[run.kind.is_global]
                        x, state, _ = bind(self.modules[run.kind], params)(x, present, step, state, (i, j))
                        return (x, state), None

                    (x, state), _ = jax.lax.scan(one, (x, state), jnp.arange(run.layers))
                    after.append(state)
                return (x, after), None

            (x, new), _ = jax.lax.scan(body, (x, old), jnp.arange(block.repeats))
            new_state.append(new)
        return x, new_state

    def _layer(self, kind: LayerKind, stacked: Params, at: tuple[jax.Array, ...]) -> Params:
        """A layer's parameters out of its run's stack; the routed experts stay where they stand."""
        return jax.tree.map(lambda spec, a: a if "expert" in spec.axes else a[at], self.tables[kind], stacked)

    def _slots(self, state: Any) -> dict[bool, int]:
        """Slots of a ring, of global layers (True) and of sliding ones."""
        if self.unrolled:
            pairs = list(zip(self.kinds(), state, strict=True))
        else:
            pairs = [(run.kind, one) for b, row in zip(self.blocks, state, strict=True)
                     for run, one in zip(b.runs, row, strict=True)]  # fmt: skip
        return {kind.is_global: one.cache.k.shape[-1] for kind, one in pairs}

    def _attention(self, is_global: bool) -> AttentionConfig:
        return self.config.global_ if is_global else self.config.sliding
