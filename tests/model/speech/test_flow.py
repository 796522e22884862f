"""The flow head learns the distribution of frames for a hidden state, and samples from this distribution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtml.config import FlowConfig
from jaxtml.model.spec import Params, bind, init_params, specs
from jaxtml.model.speech.flow import FlowHead, denormalise, normalise
from jaxtml.stream.layout import SPEECH_DIM

DIM, ROWS = 8, 64
HEAD = FlowHead(FlowConfig(width=32, depth=2, draws=4), DIM)
RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((3, DIM)).astype(np.float32)
# Four sounds as log-mels. The third hidden state has two of them, which are equally likely.
SOUNDS = np.clip(-2.5 + np.cumsum(RNG.standard_normal((4, SPEECH_DIM)), axis=1) * 0.2, -6, 1).astype(np.float32)


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws `n` times a hidden state, one of its sounds, and the sound's frames with a little noise."""
    state = rng.integers(0, 3, n)
    sound = state + (state == 2) * rng.integers(0, 2, n)
    return state, sound, SOUNDS[sound] + 0.05 * rng.standard_normal((n, SPEECH_DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> tuple[Params, np.ndarray]:
    """The parameters after 600 steps of Adam, and the loss of each step."""
    rng = np.random.default_rng(1)
    batches = [draw(rng, ROWS) for _ in range(600)]
    hidden = jnp.asarray(np.stack([HIDDEN[state] for state, _, _ in batches]))
    target = jnp.asarray(np.stack([frames for _, _, frames in batches]))
    tx = optax.adam(3e-3)
    params = init_params(specs(HEAD), 0)

    def train_step(carry: Any, batch: Any) -> Any:
        params, moments = carry
        hidden, target, key = batch
        valid = jnp.ones((ROWS,), bool)
        keys = jax.random.split(key, ROWS)
        loss, grads = jax.value_and_grad(
            lambda p: bind(HEAD, p).loss(hidden, jnp.zeros_like(target), target, valid, keys) / ROWS
        )(params)
        updates, moments = tx.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), loss

    keys = jax.random.split(jax.random.key(0), len(batches))
    (params, _), losses = jax.jit(lambda c, b: jax.lax.scan(train_step, c, b))(
        (params, tx.init(params)), (hidden, target, keys)
    )
    return params, np.asarray(losses)


def sample(params: Params, state: int, n: int, steps: int, temperature: float = 1.0) -> np.ndarray:
    noise = temperature * jax.random.normal(jax.random.key(steps), (n, SPEECH_DIM))
    hidden = jnp.broadcast_to(HIDDEN[state], (n, DIM))

    @jax.jit
    def draw(params: Params, hidden: jax.Array, noise: jax.Array) -> jax.Array:
        return bind(HEAD, params).sample(hidden[:, None], jnp.zeros_like(noise), noise[:, None], steps)[:, 0]

    return np.asarray(draw(params, hidden, noise))


def test_the_loss_falls(trained):
    _, losses = trained
    assert np.isfinite(losses).all()
    assert losses[-50:].mean() < 0.2 * losses[:20].mean()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_samples_reach_the_sound_of_their_hidden_state(trained, steps):
    for state in (0, 1):
        got = sample(trained[0], state, 16, steps)
        assert got.shape == (16, SPEECH_DIM)
        error = np.abs(got - SOUNDS[state]).mean()
        # A single step is a guess from pure noise. Its error is 0.10 to 0.24, depending on the noise drawn in training.
        limit = 0.3 if steps == 1 else 0.1
        assert error < limit, f"{error:.3f} in log10"
        assert error < limit * np.abs(got - SOUNDS[1 - state]).mean()


def test_where_two_sounds_are_right_each_sample_is_one_of_them_and_both_occur(trained):
    got = sample(trained[0], 2, 64, 4)
    apart = np.abs(SOUNDS[2] - SOUNDS[3]).mean()
    near = np.stack([np.abs(got - SOUNDS[k]).mean(axis=1) for k in (2, 3)])
    assert np.median(near.min(axis=0)) < 0.2 * apart
    assert 12 <= (near[0] < near[1]).sum() <= 52


def test_without_noise_the_sample_is_always_the_same(trained):
    one, two = (sample(trained[0], 0, 2, 2, temperature=0.0) for _ in range(2))
    np.testing.assert_array_equal(one[0], one[1])
    np.testing.assert_array_equal(one, two)


def test_samples_stay_in_the_range_of_log_mels(trained):
    wild = jax.tree.map(lambda a: 30 * a, trained[0])
    got = sample(wild, 0, 8, 4)
    assert got.min() >= -7 and got.max() <= 2


@pytest.fixture(scope="module")
def gradients(trained):
    """A function of hidden states, target and mask that returns the loss and the gradient of the hidden states."""
    params = trained[0]

    def loss(hidden: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(3), len(hidden))
        return bind(HEAD, params).loss(hidden, jnp.zeros_like(target), target, valid, keys)

    return jax.jit(jax.value_and_grad(loss))


def test_the_gradient_reaches_each_valid_hidden_state_and_no_other(gradients):
    _, _, target = draw(np.random.default_rng(2), 12)
    hidden = np.tile(HIDDEN, (4, 1))
    valid = np.arange(12) % 3 != 1
    loss, grad = gradients(hidden, target, valid)
    assert loss > 0
    assert (np.abs(grad[valid]).max(axis=1) > 0).all()
    assert not np.asarray(grad)[~valid].any()


def test_the_content_of_masked_rows_changes_nothing(gradients):
    _, _, target = draw(np.random.default_rng(2), 12)
    hidden = np.tile(HIDDEN, (4, 1))
    valid = np.arange(12) < 7
    other = np.where(valid[:, None], target, 2.0).astype(np.float32)
    loss, grad = gradients(hidden, target, valid)
    same_loss, same_grad = gradients(np.where(valid[:, None], hidden, 9.0).astype(np.float32), other, valid)
    np.testing.assert_array_equal(loss, same_loss)
    np.testing.assert_array_equal(grad[:7], same_grad[:7])
    empty_loss, empty_grad = gradients(hidden, target, np.zeros(12, bool))
    assert empty_loss == 0 and not np.asarray(empty_grad).any()


def test_normalising_is_undone():
    log_mel = np.linspace(-7, 2, 19, dtype=np.float32)
    np.testing.assert_allclose(denormalise(normalise(jnp.asarray(log_mel))), log_mel, atol=1e-6)
    assert abs(float(normalise(jnp.asarray(log_mel)).mean())) < 0.1
