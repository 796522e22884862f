"""The decoder: a stack of layers, for whole sequences and for sessions that are continued.

Axes: B batch (or session slots), T tokens, D model width, W convolution kernel, C channels of a convolution.

`Backbone.forward` runs whole sequences, in training and in checks. `Backbone.forward_cached` continues sessions, whose
past is in a `LayerState` per layer. Both give the same numbers (tests/model/test_streaming.py). Called by
`interaction`, `duplex.step` and `mtp` (which uses `Layer`).
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
from jaxtml.model.attention.cache import (
    CacheStep,
    KVCache,
    RetainedTokens,
    copy_retained,
    empty_cache,
    empty_retained,
    plan_cache_step,
    plan_retention,
)
from jaxtml.model.attention.retention import FarTokens, find_far_tokens
from jaxtml.model.experts.moe import MoE
from jaxtml.model.experts.routing import MoEStats
from jaxtml.model.layers import DenseMLP, RMSNorm, ShortConv, take_back
from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement, all_gather_parameters
from jaxtml.model.spec import Params, bind
from jaxtml.model.stack import LayerBlock, LayerKind, LayerRun, LayerStack
from jaxtml.parallel.collectives import all_gather_sums, own_part, psum_forward
from jaxtml.parallel.work import mark_pass

# Up to this many layers, loops over layers are unrolled. A loop writes what its gradient needs into one stacked array
# and reads it back, which costs a small model 6 % of a training step.
MAX_UNROLLED_LAYERS = 8

# If all devices of `expert` together have at most this many bytes of hidden states, latency is most of the time of a
# collective. On v6e:4x8, the two collectives of `Layer._feed_group` then take no longer than the five they replace.
MAX_GROUP_BYTES = 2**22


# What a layer's forward pass keeps for its backward pass, by the name in `TrainConfig.remat`.
_OUTPUTS = jax.checkpoint_policies.save_only_these_names("attention", "feed_forward")
REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda layer: layer,
    "outputs": partial(jax.checkpoint, policy=_OUTPUTS),
    "full": jax.checkpoint,
}


class LayerState(NamedTuple):
    """What a layer, or a stack of layers, remembers of each session.

    Attributes:
      cache: keys and values.
      k_tail, v_tail, attn_tail, mlp_tail: the last inputs of the four short convolutions, `[*stack, B, W - 1, C]`
        float32.
    """

    cache: KVCache
    k_tail: jax.Array
    v_tail: jax.Array
    attn_tail: jax.Array
    mlp_tail: jax.Array


# The state of all layers. If `Backbone.unrolled`, the list has one `LayerState` per layer. Otherwise it has a list for
# each block, with one stacked `LayerState` for each run (`jaxtml.model.stack` defines block and run).
BackboneState = list[Any]
# The parameters as the server holds them. If `Backbone.unrolled`, a list of one tree per layer; otherwise, the stack.
ServingLayers = Any


class Layer(nnx.Module):
    """One layer: pre-norm attention and feed-forward, each followed by a short convolution and the residual."""

    def __init__(
        self,
        config: BackboneConfig,
        kind: LayerKind,
        placement: Placement = SINGLE_DEVICE,
        prefix: str = "model.llm.layers.{layer}",
    ):
        self.kind = kind
        self.mesh = placement.mesh
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
        layer_index: tuple[jax.Array, ...] = (),
        far: FarTokens | None = None,
        group_kind: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerState | None, MoEStats | None]:
        """Runs the layer over `x` `[B, T, D]`: over whole sequences, or, with `step` and `state`, continuing sessions.

        Args:
          x: the hidden states.
          kind: `[B, T]`, the `PositionKind` of each position. It decides how the experts' stats count a position and,
            with `step`, which positions skip the experts as padding. None: text everywhere.
          step: where the T tokens stand in their sessions.
          state: what the layer remembers of the sessions, or a stack of such states.
          layer_index: empty, or the layer's index in a stack. In the latter case, `state` and the routed experts are
            those of the complete stack.
          far: what whole sequences see beyond the window of a layer that retains tokens; None: no tokens are retained.
          group_kind: `[P B, T]`, `kind` of the sessions of all P devices of `expert`. A layer of experts then runs in
            two collectives (see `_feed_group`). None: each device has its own tokens until they travel to the experts.

        Returns:
          The new hidden states, the new state (None for whole sequences), and the stats of the experts (None for a
          layer without experts, or with `group_kind`).
        """
        length = step.length if step is not None else None
        cache = state.cache if state is not None else None
        k_tail, v_tail, attn_tail, mlp_tail = (t[layer_index] for t in state[1:]) if state is not None else (None,) * 4
        tails = (k_tail, v_tail) if k_tail is not None and v_tail is not None else None
        y, cache, tails = self.attn(self.attn_norm(x), step, cache, tails, layer_index, far)
        stats = None
        if isinstance(self.mlp, MoE) and group_kind is not None:
            x, y, attn_tail = self._feed_group(x, y, attn_tail, length, group_kind, layer_index)
        else:
            y = checkpoint_name(psum_forward(y, self.mesh, TENSOR), "attention")
            y, attn_tail = self.attn_conv(y, attn_tail, length)
            x = x + y
            y = self.mlp_norm(x)
            if isinstance(self.mlp, MoE):
                y, stats = self.mlp(y, kind, layer_index, skip_padding=step is not None)
            else:
                y = self.mlp(y)
            y = checkpoint_name(y, "feed_forward")
        y, mlp_tail = self.mlp_conv(y, mlp_tail, length)
        x = x + y
        if cache is None or state is None:
            return x, None, stats
        new = (*tails, attn_tail, mlp_tail)
        if layer_index:
            new = (old.at[layer_index].set(tail) for old, tail in zip(state[1:], new, strict=True))
        return x, LayerState(cache, *new), stats

    def _feed_group(
        self,
        x: jax.Array,
        y: jax.Array,
        tail: jax.Array | None,
        length: jax.Array | None,
        kind: jax.Array,
        layer_index: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs the layer from attention's output to the experts' output, in two collectives instead of five.

        Where few tokens travel, a collective's latency is most of its time. So one all_gather sums the output of
        attention and brings the tokens of all sessions to all devices; each device then computes the experts' input of
        all sessions. A convolution's output is the sum of what its tail and its new inputs contribute. The tail's share
        travels with `x`, so the tails stay where their sessions are. The experts' input is therefore rounded once more
        than in the other branch. The hidden states of a session are not.

        Args:
          x: `[B, T, D]`, the hidden states before the layer.
          y: `[B, T, D]`, this device's part of attention's output.
          tail: of `attn_conv`.
          length: `[B]` int32, how many of the T tokens are real.
          kind: `[P B, T]`, as `group_kind` of `__call__`.
          layer_index: as for `__call__`.

        Returns:
          The hidden states after attention `[B, T, D]`, the experts' output `[B, T, D]`, and the new tail.
        """
        assert isinstance(self.mlp, MoE)
        of_tail, _ = self.attn_conv(jnp.zeros_like(y), tail)
        group_y, group_x = all_gather_sums(y, x + of_tail, self.mesh)
        y, tail = self.attn_conv(own_part(group_y, self.mesh, "expert"), tail, length)
        group_x = group_x + self.attn_conv(group_y)[0]
        return x + y, self.mlp.apply_to_group(self.mlp_norm(group_x), kind, layer_index), tail


class Backbone(LayerStack):
    """All layers, as pure functions of stacked parameters."""

    def __init__(self, config: BackboneConfig, placement: Placement = SINGLE_DEVICE):
        self.config = config
        self.placement = placement
        kinds = [LayerKind(i in config.global_layers, i >= config.n_dense) for i in range(config.n_layers)]
        super().__init__(kinds, lambda kind: Layer(config, kind, placement))

    def forward(
        self, params: Params, x: jax.Array, kind: jax.Array | None = None, remat: str = "none"
    ) -> tuple[jax.Array, list[MoEStats]]:
        """Runs all layers over whole sequences.

        Args:
          params: the stacked parameters.
          x: `[B, T, D]`, the embedded positions.
          kind: `[B, T]`, the `PositionKind` of each position, PAD where there is none; None: text everywhere. It also
            decides which tokens global layers retain (`attention.retention`).
          remat: what the backward pass computes again; see `TrainConfig.remat`.

        Returns:
          The hidden states before the final norm, and the stats of the experts, stacked `[repeats, layers, ...]`, for
          each run of layers with experts.
        """
        stats: list[MoEStats] = []
        far = find_far_tokens(self.config.global_, kind) if kind is not None else None
        unroll = self.config.n_layers <= MAX_UNROLLED_LAYERS
        for b, block in enumerate(self.blocks):

            def run_block(
                x: jax.Array, weights: Params, block: LayerBlock = block
            ) -> tuple[jax.Array, list[MoEStats | None]]:
                block_stats = []
                for r, run in enumerate(block.runs):

                    def run_layer(
                        x: jax.Array, layer: Params, layer_kind: LayerKind = run.kind
                    ) -> tuple[jax.Array, MoEStats | None]:
                        layer = all_gather_parameters(layer, self.tables[layer_kind], self.placement.mesh, x.dtype)
                        x, _, layer_stats = bind(self.modules[layer_kind], layer)(
                            x, kind, far=far if layer_kind.is_global else None
                        )
                        return x, layer_stats

                    x, run_stats = jax.lax.scan(REMAT[remat](run_layer), x, weights[f"run{r}"], unroll=unroll)
                    block_stats.append(run_stats)
                return x, block_stats

            x, block_stats = jax.lax.scan(run_block, x, params[f"block{b}"], unroll=unroll)
            stats += [run_stats for run_stats in block_stats if run_stats is not None]
        return x, stats

    @property
    def unrolled(self) -> bool:
        """Whether serving handles every layer by itself, rather than in loops over stacked layers.

        A loop cuts each layer's weights out of the stack, which slows a small model down. A large model without loops
        takes long to compile.
        """
        return self.config.n_layers <= MAX_UNROLLED_LAYERS and self.placement.mesh.devices == 1

    def prepare_for_serving(self, params: Params) -> ServingLayers:
        """Returns the parameters as `forward_cached` takes them: a list in the order of execution if `unrolled`."""
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

    def init_state(self, batch: int, max_tokens: int, dtype: jnp.dtype, max_taken_back: int = 0) -> BackboneState:
        """Returns the empty state of `batch` sessions, for calls of at most `max_tokens` tokens.

        Keys and values have the dtype `dtype`. The newest `max_taken_back` tokens of a call can be taken back.
        """
        c = self.config
        past = c.conv_kernel - 1 + max_taken_back

        def empty(kind: LayerKind, stack: tuple[int, ...] = ()) -> LayerState:
            a = self._attention_config(kind.is_global)
            channels = a.n_kv_heads * a.head_dim
            return LayerState(
                empty_cache(a, stack, batch, max_tokens, dtype),
                *(jnp.zeros((*stack, batch, past, n), jnp.float32) for n in (channels, channels, c.d_model, c.d_model)),
            )

        if self.unrolled:
            return [empty(kind) for kind in self.kinds()]
        return [[empty(run.kind, (block.repeats, run.layers)) for run in block.runs] for block in self.blocks]

    def take_back(self, state: BackboneState, count: jax.Array) -> BackboneState:
        """Returns the state without the newest `count` `[B]` int32 tokens of each session.

        Keys and values stay: they are beyond the session's position, so no query sees them before they are overwritten.
        """

        def of_layer(layer: LayerState) -> LayerState:
            return LayerState(layer.cache, *(take_back(tail, count) for tail in layer[1:]))

        return jax.tree.map(of_layer, state, is_leaf=lambda node: isinstance(node, LayerState))

    def init_retained(self, batch: int) -> RetainedTokens | None:
        """Returns which tokens `batch` sessions that have not begun retain: none. None if no layer retains tokens."""
        return empty_retained(self.config.global_, batch) if self.config.global_.retained else None

    def retain(
        self, state: BackboneState, retained: RetainedTokens, position: jax.Array, count: jax.Array
    ) -> tuple[BackboneState, RetainedTokens]:
        """Retains tokens of sessions beyond the window of global layers.

        Args:
          state: has the tokens' keys and values.
          retained: which tokens are retained so far.
          position: `[B, N]` int32, the positions of the tokens in their sessions, in order.
          count: `[B]` int32, how many of the N tokens are real.

        Returns:
          The new state, and which tokens are retained now.
        """
        plan, retained = plan_retention(self.config.global_, self._ring_slots(state)[True], retained, position, count)

        def of_layer(kind: LayerKind, layer: LayerState) -> LayerState:
            return layer._replace(cache=copy_retained(layer.cache, plan)) if kind.is_global else layer

        if self.unrolled:
            return [of_layer(kind, layer) for kind, layer in zip(self.kinds(), state, strict=True)], retained
        return [
            [of_layer(run.kind, layer) for run, layer in zip(block.runs, layers, strict=True)]
            for block, layers in zip(self.blocks, state, strict=True)
        ], retained

    def state_partition_specs(self, sessions: tuple[str, ...]) -> Any:
        """Returns a `PartitionSpec` for each array of `init_state`, on a mesh whose axes `sessions` split the batch."""
        by_head, by_channel, replicated = (
            PartitionSpec(None, None, sessions, *rest) for rest in (("tensor",), (None, "tensor"), ())
        )

        def of_layer(layer: LayerState) -> Any:
            cache: Any = jax.tree.map(lambda _: by_head, layer.cache)
            tails: Any = (by_channel, by_channel, replicated, replicated)
            return LayerState(cache, *tails)

        shapes = jax.eval_shape(lambda: self.init_state(1, 1, jnp.float32))
        return jax.tree.map(of_layer, shapes, is_leaf=lambda node: isinstance(node, LayerState))

    def forward_cached(
        self,
        layers: ServingLayers,
        x: jax.Array,
        state: BackboneState,
        position: jax.Array,
        length: jax.Array,
        retained: RetainedTokens | None = None,
    ) -> tuple[jax.Array, BackboneState]:
        """Runs all layers over T tokens that continue sessions.

        Args:
          layers: from `prepare_for_serving`.
          x: `[B, T, D]`, the embedded tokens; the real tokens of a session come first.
          state: from `init_state` or the previous call.
          position: `[B]` int32, the number of tokens of each session so far.
          length: `[B]` int32, how many of the T tokens are real.
          retained: from `init_retained` or `retain`; None: no tokens are retained.

        Returns:
          The hidden states `[B, T, D]` before the final norm, and the new state.
        """
        x = mark_pass(x)
        tokens = x.shape[1]
        present = (jnp.arange(tokens) < length[:, None]).astype(jnp.int32)
        group_present = jax.lax.all_gather(present, "expert", tiled=True) if self._runs_in_groups(x) else None
        steps = {
            is_global: plan_cache_step(
                self._attention_config(is_global), slots, position, length, tokens, retained if is_global else None
            )
            for is_global, slots in self._ring_slots(state).items()
        }
        if self.unrolled:
            return self._forward_unrolled(layers, x, state, steps, present)
        return self._forward_scanned(layers, x, state, steps, present, group_present)

    def _runs_in_groups(self, x: jax.Array) -> bool:
        """Whether the devices of `expert` exchange so few tokens `[B, T, D]` that `Layer._feed_group` is faster."""
        devices = self.placement.mesh.expert
        ring = self.placement.transport == "ring"
        return ring and devices > 1 and devices * x.size * x.dtype.itemsize <= MAX_GROUP_BYTES

    def _forward_unrolled(
        self,
        layers: list[Params],
        x: jax.Array,
        state: list[LayerState],
        steps: dict[bool, CacheStep],
        present: jax.Array,
    ) -> tuple[jax.Array, list[LayerState]]:
        """Runs `forward_cached` layer by layer; `steps` has one step per kind of attention (True: global)."""
        new_state = []
        for kind, params, old in zip(self.kinds(), layers, state, strict=True):
            x, new, _ = bind(self.modules[kind], params)(x, present, steps[kind.is_global], old)
            new_state.append(new)
        return x, new_state

    def _forward_scanned(
        self,
        layers: Params,
        x: jax.Array,
        state: list[list[LayerState]],
        steps: dict[bool, CacheStep],
        present: jax.Array,
        group_present: jax.Array | None,
    ) -> tuple[jax.Array, list[list[LayerState]]]:
        """Runs `forward_cached` in loops over stacked layers; each layer writes its state in place."""
        new_state = []
        for b, (block, old) in enumerate(zip(self.blocks, state, strict=True)):
            weights = layers[f"block{b}"]

            def run_block(
                carry: tuple[jax.Array, list[LayerState]],
                i: jax.Array,
                block: LayerBlock = block,
                weights: Params = weights,
            ) -> tuple[tuple[jax.Array, list[LayerState]], None]:
                x, states = carry
                new_states = []
                for r, (run, state) in enumerate(zip(block.runs, states, strict=True)):

                    def run_layer(
                        carry: tuple[jax.Array, LayerState],
                        j: jax.Array,
                        run: LayerRun = run,
                        stacked: Params = weights[f"run{r}"],
                    ) -> tuple[tuple[jax.Array, LayerState], None]:
                        x, state = carry
                        params = self._layer_params(run.kind, stacked, (i, j))
                        step = steps[run.kind.is_global]
                        layer = bind(self.modules[run.kind], params)
                        x, state, _ = layer(x, present, step, state, (i, j), group_kind=group_present)
                        return (x, state), None

                    (x, state), _ = jax.lax.scan(run_layer, (x, state), jnp.arange(run.layers))
                    new_states.append(state)
                return (x, new_states), None

            (x, new), _ = jax.lax.scan(run_block, (x, old), jnp.arange(block.repeats))
            new_state.append(new)
        return x, new_state

    def _layer_params(self, kind: LayerKind, stacked: Params, index: tuple[jax.Array, ...]) -> Params:
        """Returns one layer's parameters from the stack of its run; the routed experts remain a stack."""
        return jax.tree.map(lambda spec, a: a if "expert" in spec.axes else a[index], self.tables[kind], stacked)

    def _ring_slots(self, state: BackboneState) -> dict[bool, int]:
        """Returns the number of slots of a ring buffer, for global layers (True) and for sliding layers (False)."""
        if self.unrolled:
            pairs = list(zip(self.kinds(), state, strict=True))
        else:
            pairs = [(run.kind, layer_state) for block, states in zip(self.blocks, state, strict=True)
                     for run, layer_state in zip(block.runs, states, strict=True)]  # fmt: skip
        return {kind.is_global: layer_state.cache.k.shape[-1] for kind, layer_state in pairs}

    def _attention_config(self, is_global: bool) -> AttentionConfig:
        return self.config.global_ if is_global else self.config.sliding
