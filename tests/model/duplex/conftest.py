"""What the tests of the duplex step share."""

from __future__ import annotations

import pytest

from tests.model.duplex.running import MICRO_TURNS, NEAR_WEEK_END, SLOTS, Run, mixed_inputs, run_step


@pytest.fixture(scope="session")
def mixed(engine, step) -> Run:
    """Four sessions of different age, with everything that a micro-turn can hold."""
    inputs = mixed_inputs(engine.duplex, SLOTS, MICRO_TURNS)
    return run_step(step, engine.params, engine.duplex.init_state(SLOTS, 3, NEAR_WEEK_END), inputs)
