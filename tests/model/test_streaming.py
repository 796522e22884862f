"""A sequence gives the same numbers as a whole, in micro-turns of 200 ms, in pieces of any size and token by token."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import AttentionConfig, BackboneConfig
from jaxtml.model.attention.cache import NOWHERE, RetainedTokens, ring_slots
from jaxtml.model.backbone import Backbone, LayerState
from jaxtml.model.spec import init_params
from tests.model.attention.talks import PATCH, TEXT, TURN, random_kinds

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


RETAINED = 12
DENSITIES = (0.0, 0.4, 0.9)  # how often the micro-turns of each session have text


@pytest.fixture(scope="module")
def retaining(config) -> Backbone:
    """The same backbone, whose global layers retain the text of a few micro-turns beyond their window."""
    global_ = dataclasses.replace(config.global_, rel_extent=40, retained=RETAINED)
    return Backbone(dataclasses.replace(config, global_=global_))


@pytest.fixture(scope="module")
def retaining_params(retaining):
    return init_params(retaining.specs(), 4)


def _micro_turns(kinds: np.ndarray) -> Iterator[tuple[int, int, list[int]]]:
    """Yields the start and stop of each micro-turn, and the positions that a session then retains."""
    starts = np.flatnonzero(kinds == TURN)
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(kinds)
        kept = np.flatnonzero(np.isin(kinds[start:stop], [TURN, TEXT, PATCH]))
        yield start, stop, (start + kept).tolist() if TEXT in kinds[start:stop] else []


@pytest.mark.parametrize("width", [1, 3, 16])
def test_sessions_that_retain_text_equal_their_whole_sequence(retaining, retaining_params, inputs, width):
    """Runs sessions of different text density side by side, each micro-turn in calls of up to `width` tokens.

    The slots have been used before by other sessions.
    """
    kinds = np.stack([random_kinds(row, TOKENS, density) for row, density in enumerate(DENSITIES)])
    expected = np.asarray(jax.jit(lambda p, x, kind: retaining.forward(p, x, kind)[0])(retaining_params, inputs, kinds))
    layers = retaining.prepare_for_serving(retaining_params)
    step, retain = jax.jit(retaining.forward_cached), jax.jit(retaining.retain)
    used = jax.tree.map(lambda a: a + 1, retaining.init_state(3, 16, jnp.float32))
    fresh = retaining.init_state(3, 16, jnp.float32)
    state = [LayerState(u.cache, *f[1:]) for u, f in zip(used, fresh, strict=True)]
    retained = retaining.init_retained(3)
    outs = np.zeros_like(expected)
    sessions = [list(_micro_turns(kind)) for kind in kinds]
    for number in range(max(map(len, sessions))):
        # A session that has ended stays where it is.
        micro_turns = [session[number] if number < len(session) else (TOKENS, TOKENS, []) for session in sessions]
        begin, end = (np.array([part[i] for part in micro_turns]) for i in (0, 1))
        while (begin < end).any():
            length = np.minimum(end - begin, width)
            index = np.minimum(begin[:, None] + np.arange(width), TOKENS - 1)
            x = np.take_along_axis(np.asarray(inputs), index[..., None], axis=1)
            out, state = step(layers, x, state, begin.astype(np.int32), length.astype(np.int32), retained)
            for row in range(3):
                outs[row, begin[row] : begin[row] + length[row]] = out[row, : length[row]]
            begin = begin + length
        position, count = np.zeros((3, 16), np.int32), np.array([len(part[2]) for part in micro_turns], np.int32)
        for row, part in enumerate(micro_turns):
            position[row, : count[row]] = part[2]
        state, retained = retain(state, retained, position, count)
    _assert_same(outs, expected)
    assert (np.asarray(retained.count)[1:] > 2 * RETAINED).all() and retained.count[0] == 0


EIGHT_HOURS = 5_000_000  # tokens, more than a tiny session has


def _whole_rounds(config: BackboneConfig) -> int:
    """Returns the tokens of eight hours, rounded so that a token keeps its slot in every ring if moved by so many."""
    kinds = (config.global_, config.sliding)
    round_ = int(np.lcm(*(ring_slots(kind, MICRO_TURN) - kind.pinned for kind in kinds)))
    return EIGHT_HOURS // round_ * round_


@pytest.fixture(scope="module")
def silent_since(retaining, retaining_params, inputs):
    """A session that began with text and was silent for longer than its window, without log-length scaling.

    Returns the backbone, its step, the layers, the state, and which tokens are retained.
    """
    backbone = Backbone(dataclasses.replace(retaining.config, log_scaling_floor=None))
    layers = backbone.prepare_for_serving(retaining_params)
    step = jax.jit(backbone.forward_cached)
    state, retained = backbone.init_state(1, MICRO_TURN, jnp.float32), backbone.init_retained(1)
    assert retained is not None
    for start in range(0, 100, MICRO_TURN):
        x = inputs[:1, start : start + MICRO_TURN]
        _, state = step(layers, x, state, jnp.array([start]), jnp.array([MICRO_TURN]), retained)
        if start == 10:  # words at 10..13 and 18..19
            words = jnp.array([[10, 11, 12, 13, 18, 19]])
            state, retained = backbone.retain(state, retained, words, jnp.array([6]))
    return backbone, step, layers, state, retained


def test_a_session_computes_after_eight_hours_what_it_computed_at_first(silent_since, inputs):
    """Moves a session, with all that it remembers, to a position that it has after hours: the same to the bit."""
    backbone, step, layers, state, retained = silent_since
    later = _whole_rounds(backbone.config)
    x, length = inputs[:1, -MICRO_TURN:], jnp.array([MICRO_TURN])
    moved = retained._replace(position=jnp.where(retained.position < TOKENS, retained.position + later, NOWHERE))
    now, _ = step(layers, x, state, jnp.array([100]), length, retained)
    then, _ = step(layers, x, state, jnp.array([100 + later]), length, moved)
    np.testing.assert_array_equal(now, then)


def test_the_first_words_are_attended_to_after_eight_hours_of_silence(silent_since, inputs):
    backbone, step, layers, state, retained = silent_since
    position = jnp.array([100 + _whole_rounds(backbone.config)])
    x, length = inputs[:1, -MICRO_TURN:], jnp.array([MICRO_TURN])
    remembering, _ = step(layers, x, state, position, length, retained)
    forgetting, _ = step(layers, x, state, position, length, backbone.init_retained(1))
    assert float(jnp.abs(remembering - forgetting).max()) > 1e-3
    other_words = list(state)
    for number, kind in enumerate(backbone.kinds()):
        if kind.is_global:
            cache = state[number].cache
            changed_cache = cache._replace(far=cache.far._replace(v=cache.far.v.at[..., 0, :].add(1)))
            other_words[number] = state[number]._replace(cache=changed_cache)
    changed, _ = step(layers, x, other_words, position, length, retained)
    assert float(jnp.abs(remembering - changed).max()) > 1e-3, "the first retained token is not attended to"


def test_a_session_computes_the_same_to_the_bit_however_much_another_one_retains(silent_since, inputs):
    """The second ring is read up to the slot that the session with the most retained tokens has filled."""
    backbone, step, layers, state, retained = silent_since
    x = jnp.concatenate([inputs[:1, -MICRO_TURN:]] * 2)
    length, position = jnp.array([MICRO_TURN] * 2), jnp.array([100, 100])
    pair = jax.tree.map(lambda a: jnp.concatenate([a, a]), state)
    few = jax.tree.map(lambda a: jnp.concatenate([a, a]), retained)
    many = RetainedTokens(few.count.at[1].set(RETAINED), few.position.at[1].set(jnp.arange(RETAINED)))
    with_few, _ = step(layers, x, pair, position, length, few)
    with_many, _ = step(layers, x, pair, position, length, many)
    np.testing.assert_array_equal(with_few[0], with_many[0])
    assert jnp.abs(with_few[1] - with_many[1]).max() > 1e-3
