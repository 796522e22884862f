"""Mixture of experts: sigmoid router with correction bias, routed and shared experts in one normalisation.

Axes: N tokens (batch and time flattened), D model width, F expert width, E routed experts, S shared experts,
K experts per token, R rows of the sorted and padded dispatch buffer, G blocks of rows, one expert each.

Every path is dropless. `dense` (every expert on every token) is the oracle; `blocked` sorts the rows by expert, pads
each expert to whole blocks and multiplies block by block (training, long prefills); `gathered` reads only the chosen
experts' weights (decoding). The router is the released one; the correction bias selects but does not weigh.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.config import BackboneConfig
from jaxtml.model.layers import swiglu, swiglu_grad
from jaxtml.model.spec import Released, linear, normal, ones, param, zeros


class Routing(NamedTuple):
    """One routing decision. `index` and `weight` are `[N, K]`, `shared` `[N, S]`, `logits` `[N, E]` float32."""

    index: jax.Array
    weight: jax.Array
    shared: jax.Array
    logits: jax.Array


class MoEStats(NamedTuple):
    """What a layer reports: tokens per expert `[E]`, dropped tokens (always 0 here) and the router's z-loss."""

    load: jax.Array
    dropped: jax.Array
    z_loss: jax.Array


class MoE(nnx.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: BackboneConfig, prefix: str):
        c = config
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
            (e, d, 2, f),
            ("expert", "expert_embed", "gate_up", "mlp"),
            normal(c.init_std),
            released=Released(f"{prefix}.experts.w13_weight", (e, 2 * f, d), (0, 3, 2, 1), (e, f, 2, d)),
            active=share,
        )
        self.w2 = param(
            (e, f, d),
            ("expert", "mlp", "expert_embed"),
            normal(c.init_std),
            released=Released(f"{prefix}.experts.w2_weight", (e, d, f), (0, 2, 1)),
            active=share,
        )
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

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, MoEStats]:
        """`x` `[B, T, D]`, `valid` `[B, T]` bool (None: all) -> `[B, T, D]` and the layer's stats."""
        c = self.config
        batch, tokens, dim = x.shape
        flat = x.reshape(batch * tokens, dim)
        routing = self.route(flat)
        rows = batch * tokens * c.experts_per_token
        # Decoding reads K experts per token; from about four rows an expert on, sorted blocks read less.
        run = gathered if rows < 4 * c.n_experts else blocked
        out = run(flat, routing, self.w13[...].astype(x.dtype), self.w2[...].astype(x.dtype))
        for i in range(c.n_shared_experts):
            shared = swiglu(flat, self.shared_w13[i].astype(x.dtype), self.shared_w2[i].astype(x.dtype))
            out = out + routing.shared[:, i : i + 1] * shared
        mask = jnp.ones(flat.shape[:1], jnp.float32) if valid is None else valid.reshape(-1).astype(jnp.float32)
        chosen = jax.nn.one_hot(routing.index, c.n_experts, dtype=jnp.float32).sum(axis=1)
        lse = jax.nn.logsumexp(routing.logits, axis=-1)
        stats = MoEStats(
            load=(chosen * mask[:, None]).sum(axis=0),
            dropped=jnp.zeros((), jnp.int32),
            z_loss=(lse * lse * mask).sum() / jnp.maximum(mask.sum(), 1.0),
        )
        return out.reshape(batch, tokens, dim), stats


def dense(x: jax.Array, routing: Routing, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """Oracle: every expert on every token, then the weighted sum of the chosen ones."""
    outs = jax.vmap(lambda a, b: swiglu(x, a, b))(w13, w2)  # [E, N, D]
    mix = jnp.zeros((x.shape[0], w13.shape[0]), x.dtype)
    mix = mix.at[jnp.arange(x.shape[0])[:, None], routing.index].add(routing.weight)
    return jnp.einsum("ne,end->nd", mix, outs)


def gathered(x: jax.Array, routing: Routing, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """Reads the K chosen experts of each token: gather + gemv, for few tokens.

    One (token, choice) after the other: a CPU multiplies an expert where it stands, while one gather of all choices
    writes a copy that the contraction then wants transposed (ten times the time for one token of `tiny`).
    """
    n, k = routing.index.shape

    def one(_: None, row: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        token, expert = row
        gate, up = token[None] @ w13[expert, :, 0], token[None] @ w13[expert, :, 1]
        return None, ((jax.nn.silu(gate) * up) @ w2[expert])[0]

    _, outs = jax.lax.scan(one, None, (jnp.repeat(x, k, axis=0), routing.index.reshape(-1)))
    return jnp.einsum("nkd,nk->nd", outs.reshape(n, k, -1), routing.weight)


def blocked(x: jax.Array, routing: Routing, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """Sorts rows by expert, pads each expert's rows to whole blocks, multiplies block by block. Dropless.

    At most `N K / block + E` blocks exist whatever the routing, so shapes are static and nothing is ever dropped.
    """
    n, k = routing.index.shape
    experts, dim, _, _ = w13.shape
    block = _block_rows(n * k, experts)
    blocks = (n * k) // block + experts
    slot, source, block_expert = _plan(routing.index, experts, block, blocks)
    rows = _dispatch(x, source, slot).reshape(blocks, block, dim)
    out = _expert_blocks(rows, w13, w2, block_expert).reshape(blocks * block, dim)
    return _combine(out, routing.weight, slot, source)


@jax.custom_vjp
def _expert_blocks(rows: jax.Array, w13: jax.Array, w2: jax.Array, expert: jax.Array) -> jax.Array:
    """SwiGLU of block g with the weights of `expert[g]`; `rows` `[G, block, D]`, in the order of the experts.

    A loop, in which one block and the weights of one expert stay in a core's cache, and the weight gradients are summed
    in place: half the time of a batched matmul over gathered copies of the weights.
    """
    return _expert_blocks_fwd(rows, w13, w2, expert)[0]


def _expert_blocks_fwd(rows, w13, w2, expert):
    w1, w3 = jax.lax.optimization_barrier((w13[:, :, 0], w13[:, :, 1]))

    def one(_, block):
        x, e = block
        gate, up = x @ w1[e], x @ w3[e]
        return None, ((jax.nn.silu(gate) * up) @ w2[e], gate, up)

    _, (out, gate, up) = jax.lax.scan(one, None, (rows, expert))
    return out, (rows, gate, up, w13, w2, expert)


def _expert_blocks_bwd(saved, grad):
    rows, gate, up, w13, w2, expert = saved
    w1, w3 = jax.lax.optimization_barrier((w13[:, :, 0], w13[:, :, 1]))

    def one(sums, block):
        x, a, b, g, e = block
        dx, *parts = swiglu_grad(x, a, b, w1[e], w3[e], w2[e], g)
        return tuple(total.at[e].add(part) for total, part in zip(sums, parts, strict=True)), dx

    zero = (jnp.zeros_like(w1), jnp.zeros_like(w3), jnp.zeros_like(w2))
    (dw1, dw3, dw2), dx = jax.lax.scan(one, zero, (rows, gate, up, grad, expert))
    return dx, jnp.stack([dw1, dw3], axis=2), dw2, None


_expert_blocks.defvjp(_expert_blocks_fwd, _expert_blocks_bwd)


def _block_rows(rows: int, experts: int) -> int:
    """Block height: a quarter of the mean rows per expert, a power of two in 8..128."""
    target = max(8, min(128, rows // (4 * experts)))
    return 1 << (target.bit_length() - 1)


def _plan(index: jax.Array, experts: int, block: int, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each (token, choice) goes.

    Returns `slot` `[N, K]` (its row in the padded buffer), `source` `[R]` (which flat choice a row holds, N K where
    it is padding) and `block_expert` `[G]`.
    """
    flat = index.reshape(-1)
    onehot = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
    rank = jnp.take_along_axis(jnp.cumsum(onehot, axis=0) - onehot, flat[:, None], axis=1)[:, 0]
    size = onehot.sum(axis=0)
    padded_blocks = (size + block - 1) // block
    end = jnp.cumsum(padded_blocks)
    start = (end - padded_blocks) * block
    slot = start[flat] + rank
    source = (
        jnp.full((blocks * block,), flat.shape[0], jnp.int32).at[slot].set(jnp.arange(flat.shape[0], dtype=jnp.int32))
    )
    block_expert = jnp.minimum(jnp.searchsorted(end, jnp.arange(blocks), side="right"), experts - 1)
    return slot.reshape(index.shape), source, block_expert


@jax.custom_vjp
def _dispatch(x: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """`x` `[N, D]` -> rows `[R, D]`, zero where a row is padding. The adjoint is a gather too, never a scatter."""
    k = slot.shape[1]
    return x.at[source // k].get(mode="fill", fill_value=0)


def _dispatch_fwd(x, source, slot):
    return _dispatch(x, source, slot), slot


def _dispatch_bwd(slot, grad):
    return grad[slot].sum(axis=1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(rows: jax.Array, weight: jax.Array, slot: jax.Array, source: jax.Array) -> jax.Array:
    """Rows `[R, D]` back to tokens: `sum_k weight[n, k] rows[slot[n, k]]`."""
    del source
    return jnp.einsum("nkd,nk->nd", rows[slot], weight)


def _combine_fwd(rows, weight, slot, source):
    return _combine(rows, weight, slot, source), (rows, weight, slot, source)


def _combine_bwd(saved, grad):
    rows, weight, slot, source = saved
    k = slot.shape[1]
    scale = weight.reshape(-1).at[source].get(mode="fill", fill_value=0)
    drows = grad.at[source // k].get(mode="fill", fill_value=0) * scale[:, None]
    dweight = jnp.einsum("nkd,nd->nk", rows[slot], grad)
    return drows, dweight, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)
