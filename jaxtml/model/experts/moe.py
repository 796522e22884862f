"""Mixture of experts: sigmoid router with correction bias, routed and shared experts in one normalisation.

Axes: N tokens of this device (batch and time flattened), D model width, F expert width, E routed experts, L experts of
this device, S shared experts, K experts per token, P devices of the mesh axis `expert`, R rows of the sorted and padded
buffer, M modalities (`PositionKind`).

The router is the released one; the correction bias selects but does not weigh. `dense` (every expert on every token) is
the oracle. Where experts live on several devices, a transport brings tokens to them:

- `replicated`: every device has all tokens, serves those of its own experts, and the parts are summed;
- `ring`: tokens are gathered from all devices, results scattered back; runs everywhere;
- `ragged`: each token travels only to the devices of its experts (`ragged_all_to_all`, which a CPU does not have).

All three sort the rows by expert, pad each expert to whole blocks and go through `grouped.expert_rows`; few tokens are
multiplied expert by expert where the weights stand. Dropless, unless `Placement.capacity` bounds the buffer: then the
rows that do not fit are dropped, last expert first, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.experts.grouped import Experts, expert_rows, quantised
from jaxtml.model.layers import swiglu
from jaxtml.model.placement import ALONE, TENSOR, Placement
from jaxtml.model.spec import Params, Released, linear, normal, ones, param, zeros
from jaxtml.parallel.collectives import all_gather, psum, psum_backward, psum_forward, reduce_scatter
from jaxtml.stream.tokens import PositionKind

MODALITIES = len(PositionKind)


class Routing(NamedTuple):
    """One routing decision. `index` and `weight` are `[N, K]`, `shared` `[N, S]`, `logits` `[N, E]` float32."""

    index: jax.Array
    weight: jax.Array
    shared: jax.Array
    logits: jax.Array


class MoEStats(NamedTuple):
    """What a layer reports of this device's tokens: choices per modality and expert `[M, E]` (padding left out), those
    that found no room (int32), and the router's z-loss, summed over tokens."""

    load: jax.Array
    dropped: jax.Array
    z_loss: jax.Array


class MoE(nnx.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: BackboneConfig, prefix: str, placement: Placement = ALONE):
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

    def experts(self, dtype: jnp.dtype, at: tuple[jax.Array, ...] = ()) -> Experts:
        """Those of this device; int8 stays int8, other weights become `dtype`."""
        if self.placement.int8:
            return Experts(self.w13[...], self.w2[...], self.w13_scale[...], self.w2_scale[...], at)
        return Experts(self.w13[...].astype(dtype), self.w2[...].astype(dtype), at=at)

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


def with_int8_experts(params: Params) -> Params:
    """The same tree with every layer's routed experts in int8, and the scales of their columns beside them."""
    if "w13" in params and "router" in params:
        (w13, scale13), (w2, scale2) = quantised(params["w13"]), quantised(params["w2"])
        return {**params, "w13": w13, "w2": w2, "w13_scale": scale13, "w2_scale": scale2}
    return {name: with_int8_experts(part) if isinstance(part, dict) else part for name, part in params.items()}


def dense(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Oracle: every expert on every token, then the weighted sum of the chosen ones."""
    w13, w2 = experts.layer(x.dtype)
    outs = jax.vmap(lambda a, b: swiglu(x, a.swapaxes(0, 1), b))(w13, w2)  # [E, N, D]
    mix = jnp.zeros((x.shape[0], experts.count), x.dtype)
    mix = mix.at[jnp.arange(x.shape[0])[:, None], routing.index].add(routing.weight)
    return jnp.einsum("ne,end->nd", mix, outs)


Transport = Callable[[jax.Array, Routing, Experts, Placement], tuple[jax.Array, jax.Array]]


def replicated(x: jax.Array, routing: Routing, experts: Experts, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """All devices of `expert` have the same tokens `x` `[N, D]`; each adds what its L experts give.

    Returns `[N, D]`, the same on all of them, and the dropped choices of all.
    """
    axes = ("expert", "tensor")
    x, weight = (psum_backward(a, placement.mesh, axes) for a in (x, routing.weight))
    out, dropped = _own_experts(x, routing.index, weight, experts, placement)
    return psum_forward(out, placement.mesh, axes), psum(dropped, placement.mesh, ("expert",))


def ring(x: jax.Array, routing: Routing, experts: Experts, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """Tokens of all devices are gathered, results scattered back to theirs: `[N, D]` and this device's dropped choices.

    The traffic is (P - 1) x D per token, against about min(P, K) x D of `ragged`: as good where K is near P.
    """
    mesh = placement.mesh
    x, weight, index = (psum_backward(x, mesh, TENSOR), psum_backward(routing.weight, mesh, TENSOR), routing.index)
    if mesh.expert > 1:
        x, weight = (all_gather(a, ("expert",), 0) for a in (x, weight))
        index = jax.lax.all_gather(index, "expert", axis=0, tiled=True)
    out, dropped = _own_experts(x, index, weight, experts, placement)
    if mesh.expert > 1:
        out = reduce_scatter(out, ("expert",), 0)
    return psum_forward(out, mesh, TENSOR), dropped


def ragged(x: jax.Array, routing: Routing, experts: Experts, placement: Placement) -> tuple[jax.Array, jax.Array]:
    """Rows travel to the devices of their experts and back: `[N, D]` and this device's dropped choices.

    Sorted by expert, the rows for one device lie together, those for one of its experts too: one update per expert
    brings them where that expert's rows of all devices stand side by side, and nothing is sorted a second time.
    """
    mesh = placement.mesh
    if mesh.expert == 1:
        return ring(x, routing, experts, placement)
    n, k = routing.index.shape
    own = experts.count
    block = block_rows(n * k, own)
    rows = buffer_rows(n * k * mesh.expert, mesh.expert, own, block, placement.capacity)
    me = jax.lax.axis_index("expert")
    order, counts = sorted_by_expert(routing.index, own * mesh.expert)
    trip = plan_trip(jax.lax.all_gather(counts, "expert"), me, rows, block)
    x = psum_backward(x, mesh, TENSOR)
    slot = jnp.argsort(order).reshape(n, k)
    sent = _dispatch(x, order, slot)
    arrived = jax.lax.ragged_all_to_all(
        sent, _hidden_zeros(sent, rows), trip.send_from, trip.sent, trip.to, trip.received, axis_name="expert"
    )
    done = expert_rows(arrived, trip.groups, experts, block)
    back = jax.lax.ragged_all_to_all(
        done, _hidden_zeros(sent, n * k), trip.return_from, trip.received, trip.return_to, trip.sent, axis_name="expert"
    )
    out = _combine(back, psum_backward(routing.weight, mesh, TENSOR), slot, order)
    return psum_forward(out, mesh, TENSOR), (counts.sum() - trip.sent.sum()).astype(jnp.int32)


TRANSPORTS: dict[str, Transport] = {"replicated": replicated, "ring": ring, "ragged": ragged}


def _hidden_zeros(like: jax.Array, rows: int) -> jax.Array:
    """Zeros `[rows, D]` that XLA cannot see through: a constant would be kept and copied once per layer.

    No gradient passes: that of rows which nobody fills may be anything.
    """
    return jnp.broadcast_to(jax.lax.stop_gradient(like[:1]) * 0, (rows, like.shape[1]))


class Trip(NamedTuple):
    """The offsets and sizes of the two `ragged_all_to_all` of one device, and the groups that arrive there.

    `send_from`, `sent`, `to` `[E]`, by expert: where its rows stand here, how many go, and where they arrive.
    `received`, `return_from`, `return_to` `[P L]`, by device and own expert: how many come from there, where they stand
    in the buffer, and where they belong when they go home. `groups` `[L]`: rows of each own expert, padding included.
    """

    send_from: jax.Array
    sent: jax.Array
    to: jax.Array
    received: jax.Array
    return_from: jax.Array
    return_to: jax.Array
    groups: jax.Array


def plan_trip(counts: jax.Array, me: jax.Array, rows: int, block: int) -> Trip:
    """Every device's part of the exchange from the counts `[P, E]` of all: pure, the same numbers on all devices.

    Args:
      counts: rows that each device has for each expert.
      me: the index of this device.
      rows: room in the buffer of each device; what does not fit is not sent, last expert first.
      block: what an expert's rows are padded to.
    """
    devices, experts = counts.shape
    own = experts // devices
    by_owner = counts.reshape(devices, devices, own)  # [from, to, expert]
    wanted = by_owner.sum(axis=0)  # [to, expert]
    padded = (wanted + block - 1) // block * block
    start = jnp.cumsum(padded, axis=1) - padded
    room = jnp.clip(rows - start, 0, padded)
    before = jnp.cumsum(by_owner, axis=0) - by_owner  # rows of devices before, for the same expert
    kept = jnp.clip(room[None] - before, 0, by_owner)
    place = start[None] + before
    home = (jnp.cumsum(counts, axis=1) - counts).reshape(devices, devices, own)
    return Trip(
        send_from=home[me].reshape(-1),
        sent=kept[me].reshape(-1),
        to=place[me].reshape(-1),
        received=kept[:, me].reshape(-1),
        return_from=place[:, me].reshape(-1),
        return_to=home[:, me].reshape(-1),
        groups=room[me] // block * block,
    )


def sorted_by_expert(index: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The flat choices `[N K]` in the order of their experts, and how many each expert has `[E]`."""
    flat = index.reshape(-1)
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=experts)


def _own_experts(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: Experts, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """What this device's experts give to the tokens `x` `[N, D]`, weighted and summed, and the choices without room."""
    mesh = placement.mesh
    own = experts.count
    if mesh.expert > 1:
        index = index - own * jax.lax.axis_index("expert")
    n, k = index.shape
    # Decoding reads K experts per token; from about two rows an expert on, sorted blocks read less.
    if n * k >= 2 * own * mesh.expert:
        return _sorted(x, index, weight, experts, placement)
    # A kernel that reads an expert in place reads each but once.
    tpu = partial(_sorted, placement=placement) if experts.in_place else _few
    cuda = partial(_sorted, placement=placement) if experts.in_place_on_gpu else _few
    return jax.lax.platform_dependent(x, index, weight, experts, tpu=tpu, cuda=cuda, default=_few)


def _sorted(
    x: jax.Array, index: jax.Array, weight: jax.Array, experts: Experts, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Rows sorted by expert, in padded blocks."""
    (n, k), own, ways = index.shape, experts.count, placement.mesh.expert
    block = block_rows(n * k // ways, own)
    rows = buffer_rows(n * k, ways, own, block, placement.capacity)
    slot, source, groups, dropped = _plan(index, own, block, rows)
    even = -(-n * k // ways)  # choices of a device; each in a block of its own where there are few
    expected = min(rows, even * block, even + own * block // 2)
    done = expert_rows(_dispatch(x, source, slot), groups, experts, block, expected)
    return _combine(done, weight, slot, source), dropped


def _few(x: jax.Array, index: jax.Array, weight: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """Reads the chosen experts that live here, one (token, choice) after the other: gather + gemv, for few tokens.

    An expert is multiplied where it stands. One gather of all choices writes a copy of their weights, which a CPU then
    wants transposed (ten times the time for one token of `tiny`).
    """
    n, k = index.shape

    def times(row: jax.Array, weights: jax.Array, scale: jax.Array | None, *place: jax.Array | int) -> jax.Array:
        product = row @ weights[(*experts.at, *place)].astype(row.dtype)
        return product if scale is None else (product * scale[(*experts.at, *place)]).astype(row.dtype)

    def one(_: None, choice: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        token, expert = choice

        def run() -> jax.Array:
            gate, up = (times(token[None], experts.w13, experts.scale13, expert, half) for half in (0, 1))
            return times(jax.nn.silu(gate) * up, experts.w2, experts.scale2, expert)[0]

        here = (expert >= 0) & (expert < experts.count)
        return None, jax.lax.cond(here, run, lambda: jnp.zeros_like(token))

    _, outs = jax.lax.scan(one, None, (jnp.repeat(x, k, axis=0), index.reshape(-1)))
    return jnp.einsum("nkd,nk->nd", outs.reshape(n, k, -1), weight), jnp.zeros((), jnp.int32)


def block_rows(rows: int, experts: int) -> int:
    """Block height: a quarter of the mean rows per expert, a power of two in 8..128."""
    target = max(8, min(128, rows // (4 * experts)))
    return 1 << (target.bit_length() - 1)


def buffer_rows(choices: int, devices: int, experts: int, block: int, capacity: float | None) -> int:
    """Rows of a device's buffer for `choices` of `devices` devices, the padding of its experts' blocks included: for
    the worst case, or `capacity` times the mean and at least a block for each expert."""
    worst = (choices // block + experts) * block
    if capacity is None:
        return worst
    room = -(-round(capacity * choices / devices) // block) * block
    return min(worst, max(room, experts * block))


def _plan(index: jax.Array, experts: int, block: int, rows: int) -> tuple[jax.Array, ...]:
    """Where each (token, choice) goes; an index outside `[0, experts)` belongs to another device.

    Returns `slot` `[N, K]` (its row in the padded buffer; R where it has none), `source` `[R]` (which flat choice a row
    holds, N K where it is padding), the groups' padded sizes `[experts]`, and how many choices found no room.
    """
    flat = index.reshape(-1)
    here = (flat >= 0) & (flat < experts)
    onehot = jax.nn.one_hot(flat, experts, dtype=jnp.int32)  # zero for choices of other devices
    expert = jnp.clip(flat, 0, experts - 1)
    rank = jnp.take_along_axis(jnp.cumsum(onehot, axis=0) - onehot, expert[:, None], axis=1)[:, 0]
    padded = (onehot.sum(axis=0) + block - 1) // block * block
    start = jnp.cumsum(padded) - padded
    slot = start[expert] + rank
    fits = here & (slot < rows)
    slot = jnp.where(fits, slot, rows)
    choices = jnp.arange(flat.shape[0], dtype=jnp.int32)
    source = jnp.full((rows,), flat.shape[0], jnp.int32).at[slot].set(choices, mode="drop")
    groups = jnp.clip(rows - start, 0, padded) // block * block
    return slot.reshape(index.shape), source, groups, (here & ~fits).sum(dtype=jnp.int32)


@jax.custom_vjp
def _dispatch(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """`x` `[N, D]` -> rows `[R, D]`, zero where a row is padding. The adjoint is a gather too, never a scatter."""
    k = slot.shape[1]
    return x.at[source // k].get(mode="fill", fill_value=0)


def _dispatch_fwd(x, source, slot):
    return _dispatch(x, source, slot), slot


def _dispatch_bwd(slot, grad):
    return grad.at[slot].get(mode="fill", fill_value=0).sum(axis=1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(rows: jax.Array, weight: jax.Array, slot: jax.Array, source: jax.Array) -> jax.Array:
    """Rows `[R, D]` back to tokens: `sum_k weight[n, k] rows[slot[n, k]]`; a slot outside the buffer gives nothing."""
    del source
    return jnp.einsum("nkd,nk->nd", rows.at[slot].get(mode="fill", fill_value=0), weight)


def _combine_fwd(rows, weight, slot, source):
    return _combine(rows, weight, slot, source), (rows, weight, slot, source)


def _combine_bwd(saved, grad):
    rows, weight, slot, source = saved
    k = slot.shape[1]
    scale = weight.reshape(-1).at[source].get(mode="fill", fill_value=0)
    drows = grad.at[source // k].get(mode="fill", fill_value=0) * scale[:, None]
    dweight = jnp.einsum("nkd,nd->nk", rows.at[slot].get(mode="fill", fill_value=0), grad)
    return drows, dweight, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)
