"""The experts of a device give what `dense_experts` gives, which computes every expert for every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.model.experts.dense import dense_experts
from jaxtml.model.experts.dispatch import block_rows
from jaxtml.model.experts.local import apply_local_experts, apply_one_by_one
from jaxtml.model.experts.routing import Routing
from jaxtml.model.experts.weights import ExpertWeights, quantise_columns
from jaxtml.model.placement import Placement
from tests.model.experts.cases import ROUTINGS, D, E, F, K, N, choose


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(0, 0.3, s).astype(np.float32)) for s in ((N, D), (E, 2, D, F), (E, F, D)))


def sorted_by_expert(x, routing, w13, w2):
    out, dropped = apply_local_experts(x, routing.index, routing.weight, ExpertWeights(w13, w2), Placement())
    return out + 0.0 * dropped


def one_by_one(x, routing, w13, w2):
    return apply_one_by_one(x, routing.index, routing.weight, ExpertWeights(w13, w2))[0]


def all_experts(x, routing, w13, w2):
    return dense_experts(x, routing, ExpertWeights(w13, w2))


@pytest.mark.parametrize("routing_kind", ROUTINGS)
@pytest.mark.parametrize("path", [sorted_by_expert, one_by_one])
def test_both_ways_equal_dense_experts_forwards_and_backwards(path, routing_kind, weights):
    x, w13, w2 = weights
    index = jnp.asarray(choose(routing_kind), jnp.int32)
    gate = jnp.asarray(np.random.default_rng(2).random((N, K)), jnp.float32)
    out_grad = jnp.asarray(np.random.default_rng(3).normal(size=(N, D)), jnp.float32)

    def run(function):
        def forward(x, gate, w13, w2):
            routing = Routing(index, gate, jnp.zeros((N, 0)), jnp.zeros((N, E)))
            return function(x, routing, w13, w2)

        out, adjoint = jax.vjp(forward, x, gate, w13, w2)
        return out, *adjoint(out_grad)

    for name, ours, oracle in zip(["out", "x", "gate", "w13", "w2"], run(path), run(all_experts), strict=True):
        error = jnp.linalg.norm(ours - oracle) / jnp.linalg.norm(oracle)
        assert error < 2e-6, (name, float(error))


def test_int8_experts_equal_their_floats_apart_from_rounding(weights):
    x, w13, w2 = weights
    index, gate = jnp.asarray(choose("balanced"), jnp.int32), jnp.ones((N, K))
    (q13, s13), (q2, s2) = quantise_columns(w13), quantise_columns(w2)
    assert q13.dtype == q2.dtype == jnp.int8
    assert int(jnp.abs(q13).max()) == 127 and s13.shape == (E, 2, F) and s2.shape == (E, D)
    exact, _ = apply_local_experts(x, index, gate, ExpertWeights(w13, w2), Placement())
    for path in (apply_one_by_one, partial(apply_local_experts, placement=Placement())):
        rounded, _ = path(x, index, gate, ExpertWeights(q13, q2, s13, s2))
        error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
        assert 0 < error < 0.02


def test_a_buffer_that_is_too_small_drops_the_same_rows_each_time_and_counts_them(weights):
    x, w13, w2 = weights
    index = jnp.asarray(choose("skewed"), jnp.int32)
    gate = jnp.ones((N, K))
    experts = ExpertWeights(w13, w2)
    small = Placement(capacity=0.4)
    out, dropped = apply_local_experts(x, index, gate, experts, small)
    again, _ = apply_local_experts(x, index, gate, experts, small)
    np.testing.assert_array_equal(out, again)
    complete, none = apply_local_experts(x, index, gate, experts, Placement())
    assert int(none) == 0 < int(dropped) < N * K
    lost = (jnp.abs(out - complete).max(axis=1) > 1e-5).sum()
    assert 0 < int(lost) <= int(dropped)


def test_blocks_are_powers_of_two_between_8_and_128_rows():
    assert [block_rows(rows, 8) for rows in (1, 300, 12288, 10**6)] == [8, 8, 128, 128]
