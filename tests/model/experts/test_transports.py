"""Experts on eight devices give what the oracle gives: `dense_experts`, which computes every expert on one device.

A CPU cannot run the transport `ragged`. Its exchange plan is tested alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtml.config import load
from jaxtml.model.experts.dense import dense_experts
from jaxtml.model.experts.dispatch import block_rows, buffer_rows
from jaxtml.model.experts.moe import MoE
from jaxtml.model.experts.routing import Routing
from jaxtml.model.experts.transports import SUMMED, plan_exchange, replicated, ring, sort_by_expert
from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.placement import Placement
from jaxtml.model.spec import bind, init_params, specs
from jaxtml.parallel.collectives import psum_backward, psum_forward
from jaxtml.parallel.mesh import MeshShape, make_mesh

E, K, D, F = 16, 3, 16, 8
CASES = ("balanced", "skewed", "all to one", "empty experts", "few tokens")


def choices(case: str, tokens: int) -> np.ndarray:
    """Returns `[N, K]`, distinct experts for each token."""
    rng = np.random.default_rng(0)
    if case == "balanced":
        return (np.arange(tokens)[:, None] * K + np.arange(K)) % E
    if case == "all to one":
        return np.tile([5, 0, 15], (tokens, 1))
    score = rng.gumbel(size=(tokens, E)) - (0.6 * np.arange(E) if case == "skewed" else 0)
    if case == "empty experts":
        score[:, 4:12] = -np.inf
    return np.argsort(-score, axis=1)[:, :K]


def operands(case: str):
    tokens = 8 if case == "few tokens" else 192
    rng = np.random.default_rng(1)
    x, gate, grad = (rng.normal(size=s).astype(np.float32) for s in ((tokens, D), (tokens, K), (tokens, D)))
    w13, w2 = (0.3 * rng.normal(size=s).astype(np.float32) for s in ((E, 2, D, F), (E, F, D)))
    return choices(case, tokens).astype(np.int32), x, np.abs(gate), w13, w2, grad


def shard(transport, mesh_shape: MeshShape, placement: Placement):
    """Returns a transport on a mesh, as a function of global arrays, with its gradients and its dropped choices."""
    axes = SUMMED[transport.__name__]
    mesh = make_mesh(mesh_shape, jax.devices()[: mesh_shape.devices])
    batch = P() if transport is replicated else P(("replica", "data", "expert"))
    weights = (P("expert", None, None, "tensor"), P("expert", "tensor"))

    def run(index, x, gate, w13, w2, grad):
        def forward(x, gate, w13, w2):
            x, gate = (psum_backward(a, mesh_shape, axes) for a in (x, gate))
            routing = Routing(index, gate, jnp.zeros((len(x), 0)), jnp.zeros((len(x), E)))
            out, dropped = transport(x, routing, ExpertWeights(w13, w2), placement)
            return psum_forward(out, mesh_shape, axes), dropped

        out, adjoint, dropped = jax.vjp(forward, x, gate, w13, w2, has_aux=True)
        dx, dgate, dw13, dw2 = adjoint(grad)
        dw13, dw2 = (jax.lax.psum(g, ("replica", "data")) for g in (dw13, dw2))
        return out, dx, dgate, dw13, dw2, dropped[None]

    specs = (batch, batch, batch, *weights, batch)
    outs = (batch, batch, batch, *weights, P("expert"))
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False))
    return lambda *arrays: program(*(place_on_mesh(mesh, spec, a) for spec, a in zip(specs, arrays, strict=True)))


def place_on_mesh(mesh: jax.sharding.Mesh, spec: P, array: np.ndarray) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, spec))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transport", [replicated, ring])
@pytest.mark.parametrize("mesh", [MeshShape(expert=8), MeshShape(data=2, expert=2, tensor=2)], ids=str)
def test_transports_equal_the_oracle_forwards_and_backwards(mesh, transport, case):
    index, x, gate, w13, w2, grad = operands(case)
    if transport is replicated and mesh.data > 1:
        mesh = dataclasses.replace(mesh, data=1)
    run = shard(transport, mesh, Placement(mesh))
    *ours, dropped = run(index, x, gate, w13, w2, grad)

    def oracle(x, gate, w13, w2):
        routing = Routing(jnp.asarray(index), gate, jnp.zeros((len(x), 0)), jnp.zeros((len(x), E)))
        return dense_experts(x, routing, ExpertWeights(w13, w2))

    out, adjoint = jax.vjp(oracle, *map(jnp.asarray, (x, gate, w13, w2)))
    assert not np.asarray(dropped).any()
    for name, a, b in zip(("out", "x", "gate", "w13", "w2"), ours, (out, *adjoint(jnp.asarray(grad))), strict=True):
        assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(b), name


def test_a_ring_with_bounded_room_drops_the_same_rows_each_time_and_counts_them():
    index, x, gate, w13, w2, grad = operands("skewed")
    mesh = MeshShape(expert=8)
    run = shard(ring, mesh, Placement(mesh, capacity=1.0))
    first, again = (run(index, x, gate, w13, w2, grad) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    dropped = np.asarray(first[-1])
    load = np.bincount(index.reshape(-1), minlength=E).reshape(8, 2)
    assert dropped.sum() > 0
    assert not dropped[(load + 7).sum(axis=1) < len(x) * K // 8].any()  # a device that has room drops nothing


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transport", [ring, replicated])
def test_beyond_capacity_the_result_is_that_of_the_oracle_without_the_dropped_choices(case, transport):
    index, x, gate, w13, w2, grad = operands(case)
    mesh, (n, k) = MeshShape(expert=8), index.shape
    *ours, dropped = shard(transport, mesh, Placement(mesh, capacity=1.0))(index, x, gate, w13, w2, grad)
    kept, local = np.ones(n * k, bool), E // 8
    block = block_rows(n * k // 8, local)
    for device in range(8 if n * k >= 2 * E else 0):  # with few choices, there is no buffer
        start = 0
        for expert in range(local * device, local * (device + 1)):
            choices = np.flatnonzero(index.reshape(-1) == expert)
            kept[choices[max(0, buffer_rows(n * k, 8, local, block, 1.0) - start) :]] = False
            start += -(-len(choices) // block) * block
    assert (~kept).any() == (case != "few tokens")
    mask = kept.reshape(n, k)

    def oracle(x, gate, w13, w2):
        routing = Routing(jnp.asarray(index), gate * mask, jnp.zeros((n, 0)), jnp.zeros((n, E)))
        return dense_experts(x, routing, ExpertWeights(w13, w2))

    out, adjoint = jax.vjp(oracle, *map(jnp.asarray, (x, gate, w13, w2)))
    for a, b in zip(ours, (out, *adjoint(jnp.asarray(grad))), strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-6 * np.linalg.norm(b)
    assert np.asarray(dropped).sum() == (~kept).sum()


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_the_exchange_plan_of_ragged_brings_every_row_to_its_expert_and_back(case, capacity):
    """A CPU has no `ragged_all_to_all`. The test follows its definition with numpy, at the planned offsets."""
    devices, block = 4, 8
    index, *_ = operands(case)
    parts = np.split(index, devices)
    local = E // devices
    sorts = [sort_by_expert(jnp.asarray(part), E) for part in parts]
    orders, counts = [np.asarray(order) for order, _ in sorts], np.stack([count for _, count in sorts])
    rows = buffer_rows(index.size, devices, local, block, capacity)
    plans = [
        jax.tree.map(np.asarray, plan_exchange(jnp.asarray(counts), device_index, rows, block))
        for device_index in range(devices)
    ]
    # A row is a pair: its device, and the number of its choice.
    sent = [np.stack([np.full_like(order, device_index), order], axis=1) for device_index, order in enumerate(orders)]
    buffers = [np.full((rows, 2), -1) for _ in range(devices)]
    for device_index, plan in enumerate(plans):
        for update in range(E):
            to, size = update // local, plan.sent[update]
            assert size == plans[to].received.reshape(devices, local)[device_index, update % local]
            target = buffers[to][plan.send_to[update] : plan.send_to[update] + size]
            assert (target == -1).all() and len(target) == size
            target[:] = sent[device_index][plan.send_from[update] :][:size]
    returned = [np.full((len(order), 2), -1) for order in orders]
    for device_index, (plan, buffer) in enumerate(zip(plans, buffers, strict=True)):
        ends = np.cumsum(plan.groups)
        assert (plan.groups % block == 0).all() and ends[-1] <= rows
        for row in np.flatnonzero(buffer[:, 0] >= 0):
            device, choice = buffer[row]
            expert = parts[device].reshape(-1)[choice]
            assert expert == device_index * local + np.searchsorted(ends, row, side="right")
        for update in range(devices * local):
            device, size = update // local, plan.received[update]
            returned[device][plan.return_to[update] :][:size] = buffer[plan.return_from[update] :][:size]
    kept = sum((rows_back[:, 0] >= 0).sum() for rows_back in returned)
    for device_index, rows_back in enumerate(returned):
        there = rows_back[:, 0] >= 0
        np.testing.assert_array_equal(rows_back[there], sent[device_index][there])
    assert kept == index.size if capacity is None else kept == sum(plan.sent.sum() for plan in plans)
    if capacity is not None and case in ("skewed", "all to one"):
        assert kept < index.size


def test_a_layer_on_a_mesh_equals_the_layer_on_one_device():
    config = dataclasses.replace(
        load("tiny").backbone, d_model=D, d_ff_expert=F, n_experts=E, experts_per_token=K, n_shared_experts=2
    )
    params = init_params(specs(MoE(config, "mlp")), 0)
    x = np.random.default_rng(0).normal(size=(8, 24, D)).astype(np.float32)
    kind = np.random.default_rng(1).integers(0, 4, (8, 24))
    single = MoE(config, "mlp")

    def apply(layer, params, x, kind):
        return bind(layer, params)(x, kind)

    out, stats = jax.jit(lambda p: apply(single, p, x, kind))(params)
    shape = MeshShape(data=2, expert=2, tensor=2)
    layer = MoE(config, "mlp", Placement(shape))
    split = {"w13": P("expert", None, None, "tensor"), "w2": P("expert", "tensor"),
             "shared_w13": P(None, None, None, "tensor"), "shared_w2": P(None, "tensor")}  # fmt: skip
    batch = P(("data", "expert"))

    def program(params, x, kind):
        out, stats = apply(layer, params, x, kind)
        return out, jax.tree.map(lambda s: jax.lax.psum(s, ("data", "expert")), stats)

    mesh, layout = make_mesh(shape), {name: split.get(name, P()) for name in params}
    run = jax.shard_map(program, mesh=mesh, in_specs=(layout, batch, batch), out_specs=(batch, P()), check_vma=False)
    sharded_params = {name: place_on_mesh(mesh, layout[name], array) for name, array in params.items()}
    ours, ours_stats = jax.jit(run)(sharded_params, place_on_mesh(mesh, batch, x), place_on_mesh(mesh, batch, kind))
    np.testing.assert_allclose(ours, out, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(ours_stats.load, stats.load)
    np.testing.assert_allclose(ours_stats.z_loss, stats.z_loss, rtol=1e-5)
