"""The mixture of experts of one layer: a sigmoid router, routed experts and shared experts.

Axes: B batch, T tokens, N = B T tokens of this device, D model width, F expert width, E routed experts, S shared
experts. Called by `backbone`.

This module declares the parameters and adds up the parts. `routing` decides, a transport brings tokens to the devices
of their experts (`transports`), `local` applies the experts of a device, and `grouped` multiplies. Router, weights and
normalisation are the released ones (Inkling). Routed and shared experts are normalised together.

On a mesh, a device computes a part of the routed experts' sum and a part of the shared experts' sum. It adds the two
parts, and one collective sums what the devices have. So with `tensor` split, a sum over routed and shared experts is
rounded in another order than on one device.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.experts.local import apply_local_experts
from jaxtml.model.experts.routing import MoEStats, Routing, collect_stats, route
from jaxtml.model.experts.transports import SUMMED, TRANSPORTS
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.layers import swiglu
from jaxtml.model.placement import SINGLE_DEVICE, Placement
from jaxtml.model.spec import Released, linear, normal, ones, param, zeros
from jaxtml.parallel.collectives import own_part, psum, psum_backward, psum_forward
from jaxtml.parallel.mesh import MeshShape
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
        flat = x.reshape(-1, x.shape[-1])
        routing = self._route_present(flat, modality if skip_padding else None)
        mesh, axes = self.placement.mesh, SUMMED[self.placement.transport]
        transport = TRANSPORTS[self.placement.transport]
        rows, parts = psum_backward(flat, mesh, axes), _psum_weights_backward(routing, mesh, axes)
        out, dropped = transport(rows, parts, self.experts(x.dtype, layer_index), self.placement)
        shared = self._shared_experts(rows, parts.shared)
        if "expert" in axes and mesh.expert > 1:  # all devices of `expert` have the same tokens: count them once
            shared = jnp.where(jax.lax.axis_index("expert") == 0, shared, 0)
        out = psum_forward(out + shared, mesh, axes)
        kind = jnp.ones(flat.shape[:1], jnp.int32) if modality is None else modality.reshape(-1).astype(jnp.int32)
        return out.reshape(x.shape), collect_stats(routing, kind, dropped)

    def apply_to_group(self, x: jax.Array, modality: jax.Array, layer_index: tuple[jax.Array, ...]) -> jax.Array:
        """Does the same as `__call__` with `skip_padding`, in one collective, for serving.

        Every device of `expert` and `tensor` has the tokens of all sessions of these devices. It applies its share of
        the routed experts to all of them, and its share of the shared experts to its own sessions.

        Args:
          x: `[P B, T, D]`, the same on all devices of `expert` and `tensor`: the B sessions of each of the P devices of
            `expert`.
          modality: `[P B, T]`, as for `__call__`.
          layer_index: as for `__call__`.

        Returns:
          `[B, T, D]`, for the sessions of this device.
        """
        mesh = self.placement.mesh
        flat = x.reshape(-1, x.shape[-1])
        routing = self._route_present(flat, modality)
        own = partial(own_part, mesh=mesh, axis="expert")
        weights = self.experts(x.dtype, layer_index)
        out, _ = apply_local_experts(flat, routing.index, routing.weight, weights, self.placement)
        shared = self._shared_experts(own(flat), own(routing.shared))
        out = jax.lax.dynamic_update_slice_in_dim(
            out, own(out) + shared, len(shared) * jax.lax.axis_index("expert"), axis=0
        )
        return own(psum(out, mesh, ("expert", "tensor"))).reshape(-1, *x.shape[1:])

    def _route_present(self, x: jax.Array, modality: jax.Array | None) -> Routing:
        """Routes tokens `x` `[N, D]`; a PAD position of `modality` gets no routed expert."""
        routing = self.route(x)
        if modality is None:
            return routing
        padding = modality.reshape(-1, 1) == PositionKind.PAD
        return routing._replace(index=jnp.where(padding, self.config.n_experts, routing.index))

    def _shared_experts(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns this device's part of the weighted sum of the shared experts; `tensor` splits their width.

        The tokens `x` are `[N, D]`, the weights `[N, S]`.
        """
        total = jnp.zeros_like(x)
        for i in range(self.config.n_shared_experts):
            part = swiglu(x, self.shared_w13[i].astype(x.dtype), self.shared_w2[i].astype(x.dtype))
            total = total + weight[:, i : i + 1] * part
        return total


def _psum_weights_backward(routing: Routing, mesh: MeshShape, axes: tuple[str, ...]) -> Routing:
    """Returns `routing` unchanged, and sums the gradients of all weights over `axes` with one collective."""
    if all(mesh.sizes[axis] == 1 for axis in axes):
        return routing
    k = routing.weight.shape[1]
    weights = psum_backward(jnp.concatenate([routing.weight, routing.shared], axis=1), mesh, axes)
    return routing._replace(weight=weights[:, :k], shared=weights[:, k:])
