"""A layer of experts: routing, padding and stats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.model.experts.moe import MoE
from jaxtml.model.spec import bind, init_params, specs
from jaxtml.stream.tokens import PositionKind
from tests.model.experts.cases import CONFIG, D, E, K


def test_a_layer_gives_the_same_with_few_tokens_and_with_many():
    """Few tokens are computed one choice after the other, many in sorted blocks."""
    layer = MoE(CONFIG, "mlp")
    params = init_params(specs(layer), 0)
    x = jax.random.normal(jax.random.key(0), (1, 200, D))
    together, _ = bind(layer, params)(x)
    alone = jnp.concatenate([bind(layer, params)(x[:, i : i + 1])[0] for i in range(0, 200, 20)], axis=1)
    np.testing.assert_allclose(together[:, ::20], alone, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 40])  # one choice after the other, and sorted by expert
def test_skipped_padding_reads_no_expert_and_changes_no_other_token(tokens):
    module = MoE(CONFIG, "moe")
    params = init_params(specs(module), 0)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, tokens, D)), jnp.float32)
    kind = jnp.asarray(np.arange(2 * tokens).reshape(2, tokens) % 3 != 0, jnp.int32)
    run = jax.jit(lambda params, skip: bind(module, params)(x, kind, skip_padding=skip)[0], static_argnums=1)
    present, complete, skipped = np.asarray(kind, bool), run(params, False), run(params, True)
    np.testing.assert_array_equal(skipped[present], complete[present])
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
