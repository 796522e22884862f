"""The ring buffer holds the tokens that a query can see, and each key has the bias of its distance."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.cache import (
    NOWHERE,
    copy_retained,
    empty_cache,
    empty_retained,
    plan_cache_step,
    plan_retention,
    ring_bias,
    ring_slots,
)


@pytest.mark.parametrize("extent", [3, 7, 40])
def test_a_step_sees_exactly_the_window_and_the_pinned_tokens(extent):
    """Compares the plan of each call with a list of what each slot holds, in a session that wraps round the ring.

    The bias of each slot must be that of its key's distance.
    """
    config = AttentionConfig(4, 2, 8, window=7, rel_extent=extent, pinned=3)
    profile = jnp.arange(1.0, 5 * extent + 1).reshape(1, 5, 1, 1, extent)
    slots = ring_slots(config, max_tokens=5)
    cached = np.full(slots, -1)
    position = 0
    for length in (5, 1, 0, 4, 5, 5, 3, 5, 5, 5, 5):
        step = plan_cache_step(config, slots, jnp.array([position]), jnp.array([length]), 5)
        for i in range(length):
            cached[int(step.slots[0, i])] = position + i
        bias = np.asarray(ring_bias(profile, step.query, config.pinned, slots))[0, :, 0, 0]
        assert (np.asarray(step.slots[0, length:]) == slots).all()  # padding is dropped
        for i in range(length):
            distance = position + i - cached
            visible = (cached >= 0) & (distance >= 0) & ((distance < 7) | (cached < 3))
            np.testing.assert_array_equal(step.visible[0, i], visible)
            known = np.append(profile[0, i, 0, 0], np.zeros(100))[distance[visible]]
            np.testing.assert_array_equal(bias[i][visible], known)
            assert visible.sum() == len({p for p in range(position + i + 1) if position + i - p < 7 or p < 3})
        position += length


def test_a_ring_has_room_for_the_window_and_one_call():
    config = AttentionConfig(4, 2, 8, window=64, rel_extent=64, pinned=8)
    assert ring_slots(config, max_tokens=10) - config.pinned >= 64 + 9


@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_the_second_ring_holds_the_last_retained_tokens(stack):
    """Compares it with a list, as sessions retain few tokens, none, and more at once than there is room for.

    Every key and value in a slot is the position of its token.
    """
    config = AttentionConfig(2, 1, 2, window=20, rel_extent=20, pinned=4, retained=6)
    slots = ring_slots(config, max_tokens=9)
    ring = slots - config.pinned
    retained = empty_retained(config, 2)
    expected: list[list[int]] = [[], []]
    rng = np.random.default_rng(0)
    cache = empty_cache(config, stack, 2, 9, jnp.float32)
    k, v = np.array(cache.k), np.array(cache.v)
    for start in range(0, 200, 10):
        for position in range(start, start + 10):
            slot = position if position < config.pinned else config.pinned + (position - config.pinned) % ring
            k[..., slot], v[..., slot, :] = position, position
        count = rng.integers(0, 10, 2) * (rng.random(2) < 0.7)
        positions = start + np.sort(np.stack([rng.permutation(10)[:9] for _ in range(2)]), axis=1)
        step, retained = plan_retention(config, slots, retained, jnp.asarray(positions), jnp.asarray(count))
        cache = copy_retained(cache._replace(k=jnp.asarray(k), v=jnp.asarray(v)), step)
        far_k, far_v = np.asarray(cache.far.k), np.asarray(cache.far.v)
        for row in range(2):
            expected[row] += [p for p in positions[row, : count[row]].tolist() if p >= config.pinned]
            in_slots = np.asarray(retained.position[row])
            assert sorted(in_slots[in_slots < NOWHERE].tolist()) == expected[row][-config.retained :]
            filled = np.flatnonzero(in_slots < NOWHERE)
            for array in (far_k[..., row, 0, 0, :], far_v[..., row, 0, :, 1]):
                assert (array[..., filled] == in_slots[filled]).all()
    assert retained.count.tolist() == [len(tokens) for tokens in expected]
    assert min(map(len, expected)) > 3 * config.retained


def test_a_retained_token_is_seen_once():
    """Within the window a query sees it in the first ring, and beyond in the second."""
    config = AttentionConfig(2, 1, 2, window=20, rel_extent=20, retained=6)
    slots = ring_slots(config, max_tokens=1)
    _, retained = plan_retention(config, slots, empty_retained(config, 1), jnp.array([[7]]), jnp.array([1]))
    for query in range(8, 60):
        step = plan_cache_step(config, slots, jnp.array([query]), jnp.array([1]), 1, retained)
        assert step.visible[0, 0].sum() == min(query + 1, 20)
        assert step.far.visible[0, 0].sum() == (query - 7 >= 20)
