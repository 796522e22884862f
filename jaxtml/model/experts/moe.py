"""Mixture of experts: sigmoid router with correction bias, routed and shared experts in one normalisation.

Axes: N tokens of this device (batch and time flattened), D model width, F expert width, E routed experts, L experts of
this device, S shared experts, K experts per token, P devices of the mesh axis `expert`, R rows of the sorted and padded
buffer, M modalities (`PositionKind`).

The router is the released one; the correction bias selects but does not weigh. `dense_experts` is the oracle.
Where experts live on several devices, a transport brings tokens to them:

- `replicated`: every device has all tokens, serves those of its own experts, and the parts are summed;
- `ring`: tokens are gathered from all devices, results scattered back; runs everywhere;
- `ragged`: each token travels only to the devices of its experts (`ragged_all_to_all`, which a CPU does not have).

All three sort the rows by expert, pad each expert to whole blocks and go through `grouped_swiglu`; few tokens are
multiplied expert by expert where the weights stand. Dropless, unless `Placement.capacity` bounds the buffer: then the
rows that do not fit are dropped, last expert first, and counted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.experts.routing import MODALITIES, MoEStats, Routing
from jaxtml.model.experts.transports import TRANSPORTS
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.layers import swiglu
from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, ones, param, zeros
from jaxtml.parallel.collectives import psum_backward, psum_forward
from jaxtml.stream.tokens import PositionKind


class MoE(nnx.Module):
    """Router, routed experts and shared experts of one layer."""

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
            (e, 2, d, f),  # gate and up apart: a TPU lays out the last two axes in tiles
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
        """Scores tokens `x` `[N, D]` in float32; K best by score + bias, weights normalised with the shared experts."""
        c = self.config
        logits = x.astype(jnp.float32) @ self.router[...].astype(jnp.float32)
        routed, shared = logits[:, : c.n_experts], logits[:, c.n_experts :]
        chosen = jax.lax.stop_gradient(jax.nn.sigmoid(routed) + self.router_bias[...].astype(jnp.float32))
        _, index = jax.lax.top_k(chosen, c.experts_per_token)
        picked = jnp.concatenate([jnp.take_along_axis(routed, index, axis=1), shared], axis=1)
        # softmax of log-sigmoids = sigmoids divided by their sum, without underflow
        weight = jax.nn.softmax(jax.nn.log_sigmoid(picked), axis=1)
        weight = weight * (c.route_scale * self.global_scale[...].astype(jnp.float32))
        k = c.experts_per_token
        return Routing(index, weight[:, :k].astype(x.dtype), weight[:, k:].astype(x.dtype), routed)

    def experts(self, dtype: jnp.dtype, at: tuple[jax.Array, ...] = ()) -> ExpertWeights:
        """Those of this device; int8 stays int8, other weights become `dtype`."""
        if self.placement.int8:
            return ExpertWeights(self.w13[...], self.w2[...], self.w13_scale[...], self.w2_scale[...], at)
        return ExpertWeights(self.w13[...].astype(dtype), self.w2[...].astype(dtype), at=at)

    def __call__(
        self,
        x: jax.Array,
        modality: jax.Array | None = None,
        at: tuple[jax.Array, ...] = (),
        skip_padding: bool = False,
    ) -> tuple[jax.Array, MoEStats]:
        """`x` `[B, T, D]`, `modality` `[B, T]` in 0..M-1, 0 (PAD) where nothing stands (None: all text).

        With `at`, the routed experts are those of a stack of layers, everything else that of the layer at `at`. With
        `skip_padding`, no routed expert is read for positions where nothing stands.

        Returns `[B, T, D]` and the layer's stats.
        """
        batch, tokens, dim = x.shape
        flat = x.reshape(batch * tokens, dim)
        routing = self.route(flat)
        if skip_padding and modality is not None:
            nobody = modality.reshape(-1, 1) == PositionKind.PAD
            routing = routing._replace(index=jnp.where(nobody, self.config.n_experts, routing.index))
        mesh = self.placement.mesh
        transport = TRANSPORTS[self.placement.transport]
        out, dropped = transport(flat, routing, self.experts(x.dtype, at), self.placement)
        alike = psum_backward(flat, mesh, TENSOR)
        shared = jnp.zeros_like(flat)
        for i in range(self.config.n_shared_experts):
            part = swiglu(alike, self.shared_w13[i].astype(x.dtype), self.shared_w2[i].astype(x.dtype))
            shared = shared + psum_backward(routing.shared[:, i : i + 1], mesh, TENSOR) * part
        out = out + psum_forward(shared, mesh, TENSOR)
        kind = jnp.ones(flat.shape[:1], jnp.int32) if modality is None else modality.reshape(-1).astype(jnp.int32)
        present = (kind != PositionKind.PAD).astype(jnp.float32)
        chosen = jax.nn.one_hot(routing.index, self.config.n_experts, dtype=jnp.float32).sum(axis=1)
        lse = jax.nn.logsumexp(routing.logits, axis=-1)
        stats = MoEStats(
            load=(jax.nn.one_hot(kind, MODALITIES) * present[:, None]).T @ chosen,
            dropped=dropped,
            z_loss=(lse * lse * present).sum(),
        )
        return out.reshape(batch, tokens, dim), stats
