"""The mixture of experts: every path gives what every expert on every token would give, whatever the routing."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import load
from jaxtml.model.experts.dense import dense_experts
from jaxtml.model.experts.dispatch import block_rows
from jaxtml.model.experts.grouped import _swiglu_blocks, _swiglu_in_place, _swiglu_megablox, _swiglu_ragged_dot
from jaxtml.model.experts.local import apply_local_experts, apply_one_by_one
from jaxtml.model.experts.moe import MoE
from jaxtml.model.experts.routing import Routing
from jaxtml.model.experts.weights import ExpertWeights, quantise_columns
from jaxtml.model.placement import Placement
from jaxtml.model.spec import bind, init_params, specs
from jaxtml.stream.tokens import PositionKind

CONFIG = dataclasses.replace(load("tiny").backbone, d_model=24, d_ff_expert=20, n_experts=6, experts_per_token=3)
N, D, F, E, K = 150, CONFIG.d_model, CONFIG.d_ff_expert, CONFIG.n_experts, CONFIG.experts_per_token


def _choices(kind: str) -> np.ndarray:
    """`[N, K]` distinct experts per token."""
    rng = np.random.default_rng(0)
    if kind == "balanced":
        return (np.arange(N)[:, None] + np.arange(K)) % E
    if kind == "skewed":
        score = rng.gumbel(size=(N, E)) - 2.0 * np.arange(E)
        return np.argsort(-score, axis=1)[:, :K]
    if kind == "all to the same":
        return np.tile(np.array([4, 0, 2]), (N, 1))
    assert kind == "some experts empty"
    return np.argsort(rng.random((N, E - 2)), axis=1)[:, :K] + 1


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(0, 0.3, s).astype(np.float32)) for s in ((N, D), (E, 2, D, F), (E, F, D)))


def own_experts(x, routing, w13, w2):
    out, dropped = apply_local_experts(x, routing.index, routing.weight, ExpertWeights(w13, w2), Placement())
    return out + 0.0 * dropped


def one_by_one(x, routing, w13, w2):
    return apply_one_by_one(x, routing.index, routing.weight, ExpertWeights(w13, w2))[0]


def every_one(x, routing, w13, w2):
    return dense_experts(x, routing, ExpertWeights(w13, w2))


@pytest.mark.parametrize("kind", ["balanced", "skewed", "all to the same", "some experts empty"])
@pytest.mark.parametrize("path", [own_experts, one_by_one])
def test_paths_equal_every_expert_on_every_token_forwards_and_backwards(path, kind, weights):
    x, w13, w2 = weights
    index = jnp.asarray(_choices(kind), jnp.int32)
    gate = jnp.asarray(np.random.default_rng(2).random((N, K)), jnp.float32)
    out_grad = jnp.asarray(np.random.default_rng(3).normal(size=(N, D)), jnp.float32)

    def run(function):
        def forward(x, gate, w13, w2):
            routing = Routing(index, gate, jnp.zeros((N, 0)), jnp.zeros((N, E)))
            return function(x, routing, w13, w2)

        out, adjoint = jax.vjp(forward, x, gate, w13, w2)
        return out, *adjoint(out_grad)

    for name, ours, oracle in zip(["out", "x", "gate", "w13", "w2"], run(path), run(every_one), strict=True):
        error = jnp.linalg.norm(ours - oracle) / jnp.linalg.norm(oracle)
        assert error < 2e-6, (name, float(error))


@pytest.mark.parametrize("platform", [_swiglu_blocks, _swiglu_ragged_dot, _swiglu_megablox])
def test_every_platforms_grouped_matmul_is_that_of_plain_matmuls(platform):
    rng = np.random.default_rng(0)
    block, sizes, dim, width = 8, np.array([16, 0, 8, 24]), 128, 128
    rows, w13, w2 = (jnp.asarray(0.3 * rng.normal(size=s), jnp.float32)
                     for s in ((64, dim), (4, 2, dim, width), (4, width, dim)))  # fmt: skip
    used = int(sizes.sum())

    def plain(rows, w13, w2):
        expert = np.repeat(np.arange(4), sizes)
        gate, up = (jnp.einsum("nd,ndf->nf", rows[:used], w13[expert, i]) for i in (0, 1))
        return jnp.einsum("nf,nfd->nd", jax.nn.silu(gate) * up, w2[expert])

    def ours(rows, w13, w2):
        options = {"block": block} if platform is _swiglu_blocks else {"block": block, "interpret": True}
        return platform(rows, jnp.asarray(sizes), w13, w2, **({} if platform is _swiglu_ragged_dot else options))[:used]

    grad = jnp.asarray(rng.normal(size=(used, dim)), jnp.float32)
    for name, function in (
        ("out", lambda f: f(rows, w13, w2)),
        ("grads", lambda f: jax.vjp(f, rows, w13, w2)[1](grad)),
    ):
        for a, b in zip(jax.tree.leaves(function(ours)), jax.tree.leaves(function(plain)), strict=True):
            b = b[:used] if b.shape == rows.shape else b
            np.testing.assert_allclose(a[: len(b)], b, rtol=2e-4, atol=2e-4, err_msg=name)


def test_a_gpu_reads_no_int8_experts_in_place_that_it_would_miscount():
    def experts(layers: int, dtype: str) -> ExpertWeights:
        w13, w2 = (jax.ShapeDtypeStruct((layers, 64, *s), dtype) for s in ((2, 4096, 512), (512, 4096)))
        scales = [jax.ShapeDtypeStruct(w.shape[:-2] + w.shape[-1:], "float32") for w in (w13, w2)]
        return ExpertWeights(w13, w2, *(scales if dtype == "int8" else (None, None)), layer_index=(jnp.int32(0),))

    # 2**28 numbers a layer in w13: 7 layers are below 2 GiB of int8, 9 between 2 and 4; of 17 w2 is, of 33 neither.
    assert [experts(layers, "int8").in_place_on_gpu for layers in (7, 9, 17, 33)] == [True, False, False, True]
    assert all(experts(layers, "bfloat16").in_place_on_gpu for layers in (4, 7, 9, 17, 33))


@pytest.mark.parametrize(("platform", "block"), [("tpu", 8), ("cuda", 8), ("cuda", 32)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("groups", [(2, 0, 1, 3), (0, 0, 1, 0), (0, 0, 0, 0)], ids=str)
def test_serving_kernels_read_experts_where_they_stand_in_the_stack(groups, int8, platform, block):
    rng = np.random.default_rng(0)
    dim, width, sizes = 256, 128, [block * group for group in groups]
    rows = jnp.asarray(rng.normal(size=(8 * block, dim)), jnp.float32)
    w13, w2 = (jnp.asarray(0.1 * rng.normal(size=(2, 3, *s)), jnp.float32)
               for s in ((4, 2, dim, width), (4, width, dim)))  # fmt: skip
    (w13, scale13), (w2, scale2) = (quantise_columns(w) if int8 else (w, None) for w in (w13, w2))
    experts = ExpertWeights(w13, w2, scale13, scale2, (jnp.int32(1), jnp.int32(2)))
    assert experts.in_place and experts.in_place_on_gpu and experts.count == 4
    ours = _swiglu_in_place(rows, jnp.asarray(sizes), experts, block, len(rows), platform, interpret=True)
    plain13, plain2 = experts.layer(jnp.float32)
    owner = np.repeat(np.arange(4), sizes)
    used = len(owner)
    gate, up = (jnp.einsum("nd,ndf->nf", rows[:used], plain13[owner, i]) for i in (0, 1))
    expected = jnp.einsum("nf,nfd->nd", jax.nn.silu(gate) * up, plain2[owner])
    np.testing.assert_allclose(ours[:used], expected, rtol=1e-4, atol=1e-4)


def test_int8_experts_are_those_of_their_floats_but_for_the_rounding(weights):
    x, w13, w2 = weights
    index, gate = jnp.asarray(_choices("balanced"), jnp.int32), jnp.ones((N, K))
    (q13, s13), (q2, s2) = quantise_columns(w13), quantise_columns(w2)
    assert q13.dtype == q2.dtype == jnp.int8
    assert int(jnp.abs(q13).max()) == 127 and s13.shape == (E, 2, F) and s2.shape == (E, D)
    exact, _ = apply_local_experts(x, index, gate, ExpertWeights(w13, w2), Placement())
    for path in (apply_one_by_one, partial(apply_local_experts, placement=Placement())):
        rounded, _ = path(x, index, gate, ExpertWeights(q13, q2, s13, s2))
        error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
        assert 0 < error < 0.02


def test_a_layer_gives_the_same_with_few_tokens_and_with_many():
    """Few tokens go expert by expert, many through sorted blocks."""
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0)
    x = jax.random.normal(jax.random.key(0), (1, 200, D))
    together, _ = bind(layer, params)(x)
    alone = jnp.concatenate([bind(layer, params)(x[:, i : i + 1])[0] for i in range(0, 200, 20)], axis=1)
    np.testing.assert_allclose(together[:, ::20], alone, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 40])  # choice by choice, and sorted by expert
def test_padding_that_is_skipped_reads_no_expert_and_changes_nothing_beside_it(tokens):
    module = MoE(CONFIG, "moe")
    params = init_params(specs(module), 0)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, tokens, D)), jnp.float32)
    kind = jnp.asarray(np.arange(2 * tokens).reshape(2, tokens) % 3 != 0, jnp.int32)
    run = jax.jit(lambda params, skip: bind(module, params)(x, kind, skip_padding=skip)[0], static_argnums=1)
    present, whole, skipped = np.asarray(kind, bool), run(params, False), run(params, True)
    np.testing.assert_array_equal(skipped[present], whole[present])
    poisoned = run({**params, "w13": jnp.full_like(params["w13"], jnp.nan)}, True)
    assert np.isnan(poisoned[present]).all() and np.isfinite(poisoned[~present]).all()
    np.testing.assert_array_equal(poisoned[~present], skipped[~present])


def test_stats_count_real_tokens_by_modality_and_nothing_is_dropped():
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0)
    x = jax.random.normal(jax.random.key(0), (2, 50, D))
    kind = np.full((2, 50), PositionKind.TEXT)
    kind[0, 20:], kind[1, 13:] = PositionKind.USER, PositionKind.PAD
    _, stats = bind(layer, params)(x, jnp.asarray(kind))
    assert int(stats.dropped) == 0
    assert stats.load.shape == (len(PositionKind), E)
    expected = {PositionKind.TEXT: 33 * K, PositionKind.USER: 30 * K}
    np.testing.assert_array_equal(stats.load.sum(axis=1), [expected.get(k, 0) for k in PositionKind])


def test_a_buffer_that_is_too_small_drops_the_same_rows_each_time_and_counts_them(weights):
    x, w13, w2 = weights
    index = jnp.asarray(_choices("skewed"), jnp.int32)
    gate = jnp.ones((N, K))
    experts = ExpertWeights(w13, w2)
    small = Placement(capacity=0.4)
    out, dropped = apply_local_experts(x, index, gate, experts, small)
    again, _ = apply_local_experts(x, index, gate, experts, small)
    np.testing.assert_array_equal(out, again)
    whole, none = apply_local_experts(x, index, gate, experts, Placement())
    assert int(none) == 0 < int(dropped) < N * K
    lost = (jnp.abs(out - whole).max(axis=1) > 1e-5).sum()
    assert 0 < int(lost) <= int(dropped)


def test_the_correction_bias_selects_but_does_not_weigh():
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0)
    x = jax.random.normal(jax.random.key(0), (40, D))
    free = bind(layer, params).route(x)
    biased = bind(layer, params | {"router_bias": params["router_bias"].at[3].set(10.0)}).route(x)
    assert bool((biased.index == 3).any(axis=1).all())
    same = (jnp.sort(free.index, axis=1) == jnp.sort(biased.index, axis=1)).all(axis=1)
    assert 0 < int(same.sum()) < 40
    np.testing.assert_allclose(jnp.sort(free.weight[same], axis=1), jnp.sort(biased.weight[same], axis=1), rtol=1e-6)


def test_routed_and_shared_weights_sum_to_the_scale():
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0) | {"global_scale": jnp.array([1.5])}
    routing = bind(layer, params).route(jax.random.normal(jax.random.key(0), (40, D)))
    total = routing.weight.sum(axis=1) + routing.shared.sum(axis=1)
    np.testing.assert_allclose(total, 1.5 * CONFIG.route_scale, rtol=1e-6)


def test_blocks_are_powers_of_two_between_8_and_128_rows():
    assert [block_rows(rows, 8) for rows in (1, 300, 12288, 10**6)] == [8, 8, 128, 128]
