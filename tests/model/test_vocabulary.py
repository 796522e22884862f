"""Cross-entropy in chunks equals the cross-entropy of all logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtml.model import vocabulary
from jaxtml.parallel.mesh import MeshShape

N, D, V = 20, 16, 60


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(1)
    hidden, unembed = (rng.standard_normal(shape, np.float32) for shape in ((N, D), (D, V)))
    hidden[0] *= 100  # logits of several hundred: no exponential may overflow
    return hidden, unembed, rng.integers(0, V, N)


def cross_entropy(hidden, unembed, target):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ unembed, target)


@pytest.mark.parametrize("limit", [10**6, N * V // 2, N * V // 7, N])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(operands, limit, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", limit)
    hidden, unembed, target = operands
    share = np.random.default_rng(2).random(N)

    def ours(h, w):
        return (vocabulary.score_targets(h, w, target, MeshShape()).nll * share).sum()

    loss, grads = jax.value_and_grad(ours, (0, 1))(hidden, unembed)
    expected, known = jax.value_and_grad(lambda h, w: (cross_entropy(h, w, target) * share).sum(), (0, 1))(
        hidden, unembed
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(grads, known, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [10**6, N * V // 4])
def test_a_target_is_right_where_no_token_is_likelier(operands, limit, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", limit)
    hidden, unembed, target = operands
    best = (hidden @ unembed).argmax(axis=1)
    target = np.where(np.arange(N) % 2, best, target)
    np.testing.assert_array_equal(vocabulary.score_targets(hidden, unembed, target, MeshShape()).right, target == best)


def test_no_chunk_holds_more_than_its_share_of_the_logits(operands, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", N * V // 4)
    hidden, unembed, target = operands
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: vocabulary.score_targets(h, unembed, target, MeshShape()).nll.sum()))(
        hidden
    )
    assert f"{N},{V}]" not in str(jaxpr)
    assert f"f32[{N},{V // 4}]" in str(jaxpr)


def test_logits_are_summed_in_float32_whatever_the_weights():
    rng = np.random.default_rng(3)
    hidden, unembed = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((N, 64), (64, V)))
    target = rng.integers(0, V, N)
    found = vocabulary.score_targets(hidden, unembed, target, MeshShape()).nll
    exact = jnp.matmul(hidden.astype(jnp.float32), unembed.astype(jnp.float32))
    expected = optax.softmax_cross_entropy_with_integer_labels(exact, target)
    rounded = optax.softmax_cross_entropy_with_integer_labels(exact.astype(jnp.bfloat16).astype(jnp.float32), target)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(rounded - expected).max() > 1e-2
