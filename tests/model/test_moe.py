"""The mixture of experts: every path gives what every expert on every token would give, whatever the routing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import load
from jaxtml.model.moe import MoE, Routing, _block_rows, blocked, dense, gathered
from jaxtml.model.spec import bind, init_params, specs

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
    return tuple(jnp.asarray(rng.normal(0, 0.3, s).astype(np.float32)) for s in ((N, D), (E, D, 2, F), (E, F, D)))


@pytest.mark.parametrize("kind", ["balanced", "skewed", "all to the same", "some experts empty"])
@pytest.mark.parametrize("path", [blocked, gathered])
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

    for name, ours, oracle in zip(["out", "x", "gate", "w13", "w2"], run(path), run(dense), strict=True):
        error = jnp.linalg.norm(ours - oracle) / jnp.linalg.norm(oracle)
        assert error < 2e-6, (name, float(error))


def test_a_layer_gives_the_same_with_few_tokens_and_with_many():
    """Few tokens go through the gathered path, many through the blocked one."""
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0)
    x = jax.random.normal(jax.random.key(0), (1, 200, D))
    together, _ = bind(layer, params)(x)
    alone = jnp.concatenate([bind(layer, params)(x[:, i : i + 1])[0] for i in range(0, 200, 20)], axis=1)
    np.testing.assert_allclose(together[:, ::20], alone, rtol=2e-5, atol=1e-6)


def test_stats_count_real_tokens_and_nothing_is_dropped():
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0)
    x = jax.random.normal(jax.random.key(0), (2, 50, D))
    valid = jnp.arange(50) < jnp.array([[50], [13]])
    _, stats = bind(layer, params)(x, valid)
    assert int(stats.dropped) == 0
    assert float(stats.load.sum()) == 63 * K


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
    assert [_block_rows(rows, 8) for rows in (1, 300, 12288, 10**6)] == [8, 8, 128, 128]
