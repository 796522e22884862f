"""A sequence gives the same numbers as a whole, in micro-turns of 200 ms, in pieces of any size and token by token."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import AttentionConfig, BackboneConfig
from jaxtml.model.attention.cache import ring_slots
from jaxtml.model.backbone import Backbone, LayerState
from jaxtml.model.spec import init_params

TOKENS = 150
MICRO_TURN = 10  # tokens of a micro-turn that speaks: clock, four user frames, gate, four own frames


@pytest.fixture(scope="module")
def config(small) -> BackboneConfig:
    """Small rings: both wrap round several times in the session.

    Pinned tokens are seen long after they have left the window: at first within the relative extent, mostly beyond it.
    """
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=12, rel_extent=12)
    return dataclasses.replace(
        small.backbone,
        n_layers=4,
        global_layers=(1, 3),
        sliding=attention,
        global_=dataclasses.replace(attention, window=40, rel_extent=50, pinned=4),
        d_ff_expert=16,
        n_experts=8,
        log_scaling_floor=8,
    )


@pytest.fixture(scope="module")
def backbone(config):
    return Backbone(config)


@pytest.fixture(scope="module")
def params(backbone):
    return init_params(backbone.specs(), 4)


@pytest.fixture(scope="module")
def inputs(config):
    return jax.random.normal(jax.random.key(1), (3, TOKENS, config.d_model))


@pytest.fixture(scope="module")
def complete(backbone, params, inputs):
    return np.asarray(jax.jit(lambda p, x: backbone.forward(p, x)[0])(params, inputs))


@pytest.fixture(scope="module")
def step(backbone):
    return jax.jit(backbone.forward_cached)


def _stream(backbone, params, step, inputs, lengths: np.ndarray, width: int) -> np.ndarray:
    """Runs sessions in calls of `width` positions, of which `lengths` `[calls, B]` are real. Returns `[B, T, D]`."""
    layers = backbone.prepare_for_serving(params)
    batch = inputs.shape[0]
    state = backbone.init_state(batch, width, jnp.float32)
    position = np.zeros(batch, np.int32)
    outs: list[list[np.ndarray]] = [[] for _ in range(batch)]
    for length in lengths:
        index = np.minimum(position[:, None] + np.arange(width), TOKENS - 1)
        x = np.take_along_axis(np.asarray(inputs), index[..., None], axis=1)
        # The content of padding must not matter.
        x = np.where((np.arange(width) < length[:, None])[..., None], x, 7.0).astype(np.float32)
        out, state = step(layers, x, state, jnp.asarray(position), jnp.asarray(length, jnp.int32))
        for b in range(batch):
            outs[b].append(np.asarray(out[b, : length[b]]))
        position = position + length.astype(np.int32)
    assert (position == TOKENS).all()
    return np.stack([np.concatenate(rows) for rows in outs])


def _assert_same(ours: np.ndarray, reference: np.ndarray) -> None:
    error = np.linalg.norm(ours - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    assert error.max() < 1e-5, f"position {np.unravel_index(error.argmax(), error.shape)} is off by {error.max():.1e}"


def test_token_by_token_equals_the_whole_sequence(backbone, params, step, inputs, complete):
    lengths = np.ones((TOKENS, 3), np.int64)
    _assert_same(_stream(backbone, params, step, inputs, lengths, 1), complete)


def test_micro_turns_equal_the_whole_sequence(backbone, params, step, inputs, complete):
    lengths = np.full((TOKENS // MICRO_TURN, 3), MICRO_TURN)
    _assert_same(_stream(backbone, params, step, inputs, lengths, MICRO_TURN), complete)


def test_sessions_that_advance_by_different_lengths_each_equal_their_whole_sequence(
    backbone, params, step, inputs, complete
):
    """The pieces are random and may be empty. The sessions have different ages in every call."""
    rng = np.random.default_rng(0)
    lengths, done = [], np.array([0, 0, 0])
    for call in range(200):
        length = np.minimum(rng.integers(0, MICRO_TURN + 1, 3) * (call >= np.array([0, 5, 11])), TOKENS - done)
        lengths.append(length)
        done = done + length
    _assert_same(_stream(backbone, params, step, inputs, np.array(lengths), MICRO_TURN), complete)


def test_rings_are_shorter_than_the_session_and_wrap_round(config):
    assert ring_slots(config.sliding, MICRO_TURN) < TOKENS / 4
    assert ring_slots(config.global_, MICRO_TURN) < TOKENS / 2


def test_a_session_that_does_not_advance_keeps_its_state_to_the_bit(backbone, params, step, inputs):
    layers = backbone.prepare_for_serving(params)
    state = backbone.init_state(3, MICRO_TURN, jnp.float32)
    position, full = jnp.zeros(3, jnp.int32), jnp.full(3, MICRO_TURN, jnp.int32)
    _, state = step(layers, inputs[:, :MICRO_TURN], state, position, full)
    _, after = step(layers, inputs[:, MICRO_TURN : 2 * MICRO_TURN], state, position + MICRO_TURN, full.at[1].set(0))
    for before, later in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before[1], later[1])
        assert (np.asarray(before[0]) != np.asarray(later[0])).any()


def test_a_new_session_in_a_used_slot_sees_nothing_of_the_old_one(backbone, params, step, inputs):
    """Only position 0 and empty convolution tails mark a fresh slot: old keys are never seen."""
    layers = backbone.prepare_for_serving(params)
    fresh = backbone.init_state(3, MICRO_TURN, jnp.float32)
    position, full = jnp.zeros(3, jnp.int32), jnp.full(3, MICRO_TURN, jnp.int32)
    used = fresh
    for i in range(3):
        _, used = step(layers, inputs[:, i * MICRO_TURN : (i + 1) * MICRO_TURN], used, position + i * MICRO_TURN, full)
    reused = [LayerState(u.cache, *f[1:]) for u, f in zip(used, fresh, strict=True)]
    x = inputs[:, -MICRO_TURN:]
    expected, _ = step(layers, x, fresh, position, full)
    got, _ = step(layers, x, reused, position, full)
    np.testing.assert_array_equal(expected, got)


def test_memory_is_flat_however_long_the_session(backbone, params, step, inputs):
    layers = backbone.prepare_for_serving(params)
    state = jax.eval_shape(partial(backbone.init_state, 3, MICRO_TURN, jnp.float32))
    shapes = jax.tree.map(lambda a: a.shape, state)
    late = jnp.full(3, 10**6, jnp.int32)
    _, after = jax.eval_shape(
        backbone.forward_cached, layers, inputs[:, :MICRO_TURN], state, late, jnp.full(3, MICRO_TURN, jnp.int32)
    )
    assert shapes == jax.tree.map(lambda a: a.shape, after)
