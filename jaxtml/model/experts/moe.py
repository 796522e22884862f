"""The mixture of experts of one layer: a sigmoid router, routed experts and shared experts.

Axes: B batch, T tokens, N = B T tokens of this device, D model width, F expert width, E routed experts, S shared
experts. Called by `backbone`.

This module declares the parameters and adds up the parts. `routing` decides, a transport brings tokens to the devices
of their experts (`transports`), `local` applies the experts of a device, and `grouped` multiplies. Router, weights and
normalisation are the released ones (Inkling). Routed and shared experts are normalised together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.experts.routing import MoEStats, Routing, collect_stats, route
from jaxtml.model.experts.transports import TRANSPORTS
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.layers import swiglu
from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, ones, param, zeros
from jaxtml.parallel.collectives import psum_backward, psum_forward
from jaxtml.stream.tokens import PositionKind


class MoE(nnx.Module):
    """The router, the routed experts and the shared experts of one layer."""

    def __init__(self, config: BackboneConfig, prefix: str, placement: Placement = SINGLE_DEVICE):
        c = config
        self.placement = placement
        d, f, e, s = c.d_model, c.d_ff_expert, c.n_experts, c.n_shared_experts
        self.config = c
        share = c.experts_per_token / c.n_experts
        self.router = param(
            (d, e + s),
            ("embed", "router"),
            normal(c.init_std),
            released=linear(f"{prefix}.gate.weight", d, e + s),
        )
        self.router_bias = param(
            (e,), ("router",), zeros, released=Released(f"{prefix}.gate.bias", (e,)), trained=False
        )
        self.global_scale = param((1,), ("scalar",), ones, released=Released(f"{prefix}.gate.global_scale", (1,)))
        self.w13 = param(
            (e, 2, d, f),  # gate and up are not in the last two axes, which a TPU lays out in tiles
            ("expert", "gate_up", "expert_embed", "mlp"),
            normal(c.init_std),
            released=Released(f"{prefix}.experts.w13_weight", (e, 2 * f, d), (0, 2, 3, 1), (e, f, 2, d)),
            active=share,
        )
        self.w2 = param(
            (e, f, d),
            ("expert", "mlp", "expert_embed"),
            normal(c.init_std),
            released=Released(f"{prefix}.experts.w2_weight", (e, d, f), (0, 2, 1)),
            active=share,
        )
        if placement.int8:
            self.w13_scale = param((e, 2, f), ("expert", "gate_up", "mlp"), ones, active=share)
            self.w2_scale = param((e, d), ("expert", "expert_embed"), ones, active=share)
        self.shared_w13 = param(
            (s, d, 2, f),
            ("shared", "embed", "gate_up", "mlp"),
            normal(c.init_std),
            released=Released(f"{prefix}.shared_experts.shared_w13_weight", (s, 2 * f, d), (0, 3, 2, 1), (s, f, 2, d)),
        )
        self.shared_w2 = param(
            (s, f, d),
            ("shared", "mlp", "embed"),
            normal(c.init_std),
            released=Released(f"{prefix}.shared_experts.shared_w2_weight", (s, d, f), (0, 2, 1)),
        )

    def route(self, x: jax.Array) -> Routing:
        """Routes tokens `x` `[N, D]`."""
        return route(x, self.router[...], self.router_bias[...], self.global_scale[...], self.config)

    def experts(self, dtype: jnp.dtype, layer_index: tuple[jax.Array, ...] = ()) -> ExpertWeights:
        """Returns the routed experts of this device; int8 weights stay int8, other weights become `dtype`."""
        if self.placement.int8:
            return ExpertWeights(self.w13[...], self.w2[...], self.w13_scale[...], self.w2_scale[...], layer_index)
        return ExpertWeights(self.w13[...].astype(dtype), self.w2[...].astype(dtype), layer_index=layer_index)

    def __call__(
        self,
        x: jax.Array,
        modality: jax.Array | None = None,
        layer_index: tuple[jax.Array, ...] = (),
        skip_padding: bool = False,
    ) -> tuple[jax.Array, MoEStats]:
        """Applies the experts.

        Args:
          x: `[B, T, D]`.
          modality: `[B, T]`, the `PositionKind` of each position, PAD where there is none; None: text everywhere.
          layer_index: empty, or the layer's index in a stack. In the latter case, the routed experts are those of the
            complete stack. All other parameters are always those of the one layer.
          skip_padding: read no routed expert for PAD positions.

        Returns:
          `[B, T, D]` and the layer's stats.
        """
        batch, tokens, dim = x.shape
        flat = x.reshape(batch * tokens, dim)
        routing = self.route(flat)
        if skip_padding and modality is not None:
            padding = modality.reshape(-1, 1) == PositionKind.PAD
            routing = routing._replace(index=jnp.where(padding, self.config.n_experts, routing.index))
        transport = TRANSPORTS[self.placement.transport]
        out, dropped = transport(flat, routing, self.experts(x.dtype, layer_index), self.placement)
        out = out + self._shared_experts(flat, routing)
        kind = jnp.ones(flat.shape[:1], jnp.int32) if modality is None else modality.reshape(-1).astype(jnp.int32)
        stats = collect_stats(routing, kind, dropped)
        return out.reshape(batch, tokens, dim), stats

    def _shared_experts(self, x: jax.Array, routing: Routing) -> jax.Array:
        """Returns the weighted sum of the shared experts for tokens `x` `[N, D]`; `tensor` splits their width."""
        mesh = self.placement.mesh
        replicated = psum_backward(x, mesh, TENSOR)
        total = jnp.zeros_like(x)
        for i in range(self.config.n_shared_experts):
            part = swiglu(replicated, self.shared_w13[i].astype(x.dtype), self.shared_w2[i].astype(x.dtype))
            total = total + psum_backward(routing.shared[:, i : i + 1], mesh, TENSOR) * part
        return psum_forward(total, mesh, TENSOR)
