"""The ring buffer holds the tokens that a query can see, and each key has the bias of its distance."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.cache import plan_cache_step, ring_bias, ring_slots


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
