"""A small layer of experts, and choices of experts from balanced to extreme, for the tests of this folder."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxtml.config import load

CONFIG = dataclasses.replace(load("tiny").backbone, d_model=24, d_ff_expert=20, n_experts=6, experts_per_token=3)
N, D, F, E, K = 150, CONFIG.d_model, CONFIG.d_ff_expert, CONFIG.n_experts, CONFIG.experts_per_token
ROUTINGS = ("balanced", "skewed", "all to the same", "some experts empty")


def choose(routing: str) -> np.ndarray:
    """Returns `[N, K]`, distinct experts for each token."""
    rng = np.random.default_rng(0)
    if routing == "balanced":
        return (np.arange(N)[:, None] + np.arange(K)) % E
    if routing == "skewed":
        score = rng.gumbel(size=(N, E)) - 2.0 * np.arange(E)
        return np.argsort(-score, axis=1)[:, :K]
    if routing == "all to the same":
        return np.tile(np.array([4, 0, 2]), (N, 1))
    assert routing == "some experts empty"
    return np.argsort(rng.random((N, E - 2)), axis=1)[:, :K] + 1
