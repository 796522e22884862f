"""Runs sessions through a step, for the tests of this folder: inputs of every kind, outputs on the host, comparison."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtml.config import Config
from jaxtml.model.duplex.programs import Duplex, Step
from jaxtml.model.duplex.state import DuplexState, MicroTurnInputs, MicroTurnOutputs
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, init_params
from jaxtml.stream.clock import WEEK_MS
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control

SLOTS = 4
STARTS = (0, 3, 7, 1)
"""The micro-turn in which the session of each slot begins."""

MICRO_TURNS = 45
"""About 500 positions per session: twelve windows of the global layers, forty of the sliding layers."""

NEAR_WEEK_END = WEEK_MS - 5 * MICRO_TURN_MS
"""Wall clock at the start, so that the week ends during the session."""


class Run(NamedTuple):
    """Sessions that ran side by side: inputs and outputs by micro-turn, and the last state, all on the host."""

    inputs: list[MicroTurnInputs]
    outputs: list[MicroTurnOutputs]
    state: DuplexState


def mixed_inputs(
    duplex: Duplex, batch: int, micro_turns: int, starts: tuple[int, ...] = STARTS
) -> list[MicroTurnInputs]:
    """Returns random frames, with typed text and patches now and then, for slots that begin late and pause."""
    rng = np.random.default_rng(5)
    c = duplex.model.config.duplex
    made = []
    for micro_turn in range(micro_turns):
        typed = rng.integers(0, c.control_base, (batch, c.max_typed), dtype=np.int32)
        typed[:, 0] = c.control_base + Control.TYPED
        has_text, has_patches = rng.random((2, batch)) < 0.2
        arrays: dict[str, Any] = dict(  # on the host
            bins=rng.integers(0, 16, (batch, 4, 80), dtype=np.uint8),
            typed=typed,
            typed_length=(has_text * rng.integers(2, c.max_typed + 1, batch)).astype(np.int32),
            patches=rng.standard_normal((batch, c.max_patches, 2, 40, 40, 3)).astype(np.float32),
            patch_count=(has_patches * rng.integers(1, c.max_patches + 1, batch)).astype(np.int32),
            active=np.array([micro_turn >= start for start in starts]) & (rng.random(batch) < 0.9),
        )
        made.append(MicroTurnInputs(**arrays))
    return made


def run_step(step: Step, params: Params, state: DuplexState, inputs: list[MicroTurnInputs]) -> Run:
    outputs = []
    for micro_turn in inputs:
        state, out = step(params, state, micro_turn)
        outputs.append(jax.device_get(out))
    return Run(inputs, outputs, jax.device_get(state))


def active_micro_turns(run: Run, slot: int) -> list[tuple[MicroTurnInputs, MicroTurnOutputs]]:
    """Returns inputs and outputs of one slot, for the micro-turns in which the slot was active."""
    pairs = [
        jax.tree.map(lambda a: a[slot], (inputs, out)) for inputs, out in zip(run.inputs, run.outputs, strict=True)
    ]
    return [(inputs, out) for inputs, out in pairs if inputs.active]


def assert_same(a: list[MicroTurnOutputs], b: list[MicroTurnOutputs], exact: bool) -> None:
    """Asserts equal choices and numbers.

    Unless `exact`, numbers may differ by 1e-4, because matrix products of other shapes round differently.
    """
    for micro_turn, (x, y) in enumerate(zip(a, b, strict=True)):
        for name in ("tokens", "count", "speaking", "frames"):
            message = f"micro-turn {micro_turn}: {name}"
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name), err_msg=message)
        for name in ("wave", "p_speak", "logits"):
            message = f"micro-turn {micro_turn}: {name}"
            atol = 0 if exact else 1e-4
            np.testing.assert_allclose(getattr(x, name), getattr(y, name), rtol=0, atol=atol, err_msg=message)


def two_layers(small: Config, flow_steps: int, **duplex: Any) -> Config:
    """Returns the small config with one layer of each kind and other limits. It compiles quickly."""
    backbone = dataclasses.replace(small.backbone, n_layers=2, n_dense=1, global_layers=(1,))
    return dataclasses.replace(
        small,
        backbone=backbone,
        duplex=dataclasses.replace(small.duplex, **duplex),
        flow=dataclasses.replace(small.flow, steps=flow_steps),
    )


def run_sessions(config: Config, micro_turns: int, batch: int = 2, seed: int = 0) -> Run:
    """Compiles a step for `config` and runs `batch` sessions of mixed inputs from the first micro-turn on."""
    duplex = Duplex(InteractionModel(config), trace=True)
    params = jax.jit(duplex.prepare)(init_params(duplex.model.specs(), 0))
    inputs = mixed_inputs(duplex, batch, micro_turns, (0,) * batch)
    return run_step(duplex.compiled(params, batch), params, duplex.init_state(batch, seed), inputs)
