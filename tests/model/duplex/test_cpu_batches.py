"""A CPU that computes a few slots at a time gives what a CPU that computes all slots at once gives."""

from __future__ import annotations

import jax
import numpy as np

from jaxtml.model.duplex import cpu_batches
from tests.model.duplex.running import assert_same, run_sessions, two_layers


def test_a_few_slots_at_a_time_give_the_same_sessions(small, monkeypatch):
    config, batch = two_layers(small, flow_steps=1), 5
    monkeypatch.setattr(cpu_batches, "CPU_BATCH", batch)
    at_once = run_sessions(config, 16, batch)
    spoke = np.array([out.speaking for out in at_once.outputs])
    assert spoke.any(axis=1).any() and (spoke.sum(axis=1) > 2).any(), "too few sessions speak for a comparison"
    monkeypatch.setattr(cpu_batches, "CPU_BATCH", 2)
    in_batches = run_sessions(config, 16, batch)
    assert_same(at_once.outputs, in_batches.outputs, exact=False)
    a, b = at_once.state, in_batches.state
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), a.layers, b.layers)
    np.testing.assert_array_equal(a.own_frames, b.own_frames)
