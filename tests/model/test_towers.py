"""Input embeddings: the bag of dMel bins, and the clock."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.config import load
from jaxtml.model.spec import bind, init_params, specs
from jaxtml.model.towers import FEW_FRAMES, ClockTower, DmelTower
from jaxtml.stream.clock import CLOCK_FEATURES

CONFIG = dataclasses.replace(load("tiny").backbone, d_model=16)


def test_the_bag_of_many_frames_equals_the_bag_of_few():
    tower = DmelTower(CONFIG)
    params = init_params(specs(tower), 0)
    bins = jax.random.randint(jax.random.key(0), (3, FEW_FRAMES, 80), 0, 16).astype(jnp.uint8)
    together = bind(tower, params)(bins, jnp.float32)
    alone = jnp.stack([bind(tower, params)(row, jnp.float32) for row in bins])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_every_channel_has_its_own_row_for_every_bin():
    tower = DmelTower(CONFIG)
    params = init_params(specs(tower), 0)
    bins = np.zeros((1, 80), np.uint8)
    bins[0, 7] = 5
    table = np.asarray(params["weight"]).reshape(80, 16, -1)
    total = table[:, 0].sum(axis=0) - table[7, 0] + table[7, 5]
    expected = total / np.sqrt(np.mean(total**2) + 1e-6)
    np.testing.assert_allclose(bind(tower, params)(bins, jnp.float32)[0], expected, rtol=1e-5, atol=1e-6)


def test_the_clock_starts_neutral():
    clock = ClockTower(CONFIG)
    features = jnp.ones((2, 3, CLOCK_FEATURES))
    assert not bind(clock, init_params(specs(clock), 0))(features, jnp.float32).any()
