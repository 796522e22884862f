"""One micro-turn as one program: the same model as in training, independent sessions, and exact silence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml import config as configs
from jaxtml.config import Config
from jaxtml.model.duplex.state import MicroTurnInputs, MicroTurnOutputs
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.spec import Params
from jaxtml.stream.clock import WEEK_MS, clock_features
from jaxtml.stream.dmel import SILENT_BINS
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control, PositionKind
from tests.model.duplex.running import NEAR_WEEK_END, SLOTS, active_micro_turns, assert_same, mixed_inputs, run_step


def training_sequence(
    micro_turns: list[tuple[MicroTurnInputs, MicroTurnOutputs]], base: int
) -> tuple[dict[str, list], list[int], list]:
    """Rebuilds a session as the training forward reads it, from the inputs and outputs of one slot alone.

    Returns:
      The columns of `Inputs`, the positions that predict the generated tokens, and the session's logits there.
    """
    rows: dict[str, list] = {"kind": [], "ids": [], "bins": [], "clock": [], "patches": []}
    at: list[int] = []
    logits: list[np.ndarray] = []
    nothing = np.zeros(80, np.uint8)

    def add(kind: PositionKind, token: int = 0, bins: np.ndarray = nothing, micro_turn: int = 0) -> None:
        rows["kind"].append(kind)
        rows["ids"].append(token)
        rows["bins"].append(bins)
        rows["clock"].append(
            clock_features(np.array(micro_turn), np.array((NEAR_WEEK_END + MICRO_TURN_MS * micro_turn) % WEEK_MS))
        )

    silent = np.repeat(SILENT_BINS[None], 4, axis=0)
    before = silent
    for micro_turn, (inputs, out) in enumerate(micro_turns):
        add(PositionKind.TURN, base + Control.TURN, micro_turn=micro_turn)
        for token in inputs.typed[: inputs.typed_length]:
            add(PositionKind.TEXT, int(token))
        for patch in inputs.patches[: inputs.patch_count]:
            add(PositionKind.PATCH)
            rows["patches"].append(patch)
        for frame in inputs.bins:
            add(PositionKind.USER, bins=frame)
        *text, _ = out.tokens[: out.count]
        for i, row in enumerate(out.logits[: out.count]):
            at.append(len(rows["kind"]) - 1)
            logits.append(row)
            if i < len(text):  # the gate has no position
                add(PositionKind.TEXT, int(text[i]))
        if out.speaking:
            for frame in before:
                add(PositionKind.OWN, bins=frame)
        before = out.frames if out.speaking else silent
    return rows, at, logits


def test_a_replay_through_the_training_forward_gives_the_same_logits(engine, params, mixed):
    base = engine.config.duplex.control_base
    sessions = [training_sequence(active_micro_turns(mixed, slot), base) for slot in range(SLOTS)]
    longest = max(len(rows["kind"]) for rows, _, _ in sessions)
    assert longest > 10 * engine.config.backbone.global_.window
    outputs = [out for slot in range(SLOTS) for _, out in active_micro_turns(mixed, slot)]
    assert 0.2 < np.mean([out.speaking for out in outputs]) < 0.8

    def padded(name: str, length: int) -> jax.Array:
        lists = [rows[name] for rows, _, _ in sessions]
        shape = next(np.shape(values[0]) for values in lists if values)
        out = np.zeros((SLOTS, length, *shape), np.asarray(lists[0][0]).dtype)
        for i, values in enumerate(lists):
            out[i, : len(values)] = values
        return jnp.asarray(out)

    patches = max(len(rows["patches"]) for rows, _, _ in sessions)
    assert patches > 0
    inputs = Inputs(*(padded(name, patches if name == "patches" else longest) for name in Inputs._fields))
    inputs = inputs._replace(kind=inputs.kind.astype(jnp.uint8), ids=inputs.ids.astype(jnp.int32))
    replayed = _replay(engine.config, params, inputs)
    forgetful = _replay(configs.override(engine.config, "backbone.global_.retained=0"), params, inputs)
    for slot, (_, at, logits) in enumerate(sessions):
        np.testing.assert_allclose(replayed[slot, at], np.stack(logits), atol=5e-5, err_msg=f"slot {slot}")
        assert np.abs(forgetful[slot, at] - np.stack(logits)).max() > 0.01, "retained tokens are not attended to"


def _replay(config: Config, params: Params, inputs: Inputs) -> np.ndarray:
    """Returns the logits `[B, T, V]` of whole sequences."""
    model = InteractionModel(config)
    forward = jax.jit(lambda p, x: model.logits(p, model.hidden(p, x, jnp.dtype("float32"))[0]))
    return np.asarray(forward(params, inputs))


def test_a_long_session_of_mixed_inputs_compiles_nothing_more(engine, step, compilations):
    duplex = engine.duplex
    inputs = mixed_inputs(duplex, SLOTS, 60) + [jax.device_get(duplex.empty_inputs(SLOTS))] * 20
    state, _ = step(engine.params, duplex.init_state(SLOTS), inputs[0])
    before = len(compilations)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    arrays = None
    for micro_turn, given in enumerate(inputs):
        state, out = step(engine.params, state, given)
        del out
        if micro_turn == 10:
            arrays = len(jax.live_arrays())
    assert len(compilations) == before
    assert len(jax.live_arrays()) == arrays, "memory grows with the session"
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    assert int(state.position.max()) > 10 * engine.config.backbone.global_.window


def test_the_step_as_a_jitted_function_is_traced_once(engine):
    traces = []

    def step(*args: Any) -> Any:
        traces.append(1)
        return engine.duplex.step(*args)

    jitted = jax.jit(step, donate_argnums=1)
    state = engine.duplex.init_state(SLOTS)
    for given in mixed_inputs(engine.duplex, SLOTS, 6, (0,) * SLOTS):
        state, _ = jitted(engine.params, state, given)
    assert len(traces) == 1


def test_the_same_seed_gives_the_same_session_and_another_seed_another_voice(engine, step, mixed):
    again = run_step(step, engine.params, engine.duplex.init_state(SLOTS, 3, NEAR_WEEK_END), mixed.inputs)
    assert_same(mixed.outputs, again.outputs, exact=True)
    other = run_step(step, engine.params, engine.duplex.init_state(SLOTS, 4, NEAR_WEEK_END), mixed.inputs)
    assert any((a.frames != b.frames).any() for a, b in zip(mixed.outputs, other.outputs, strict=True))


@pytest.mark.parametrize(("slot", "other_slot"), [(0, 0), (2, 0), (1, 3)])
def test_a_session_depends_neither_on_its_neighbours_nor_on_its_slot(engine, step, mixed, slot, other_slot):
    alone = engine.duplex.init_state(SLOTS, 3, NEAR_WEEK_END)
    alone = alone._replace(key=alone.key.at[other_slot].set(jnp.array([3, slot], jnp.uint32)))
    inputs = []
    for given in mixed.inputs:
        moved = jax.tree.map(np.zeros_like, given)
        for from_, to in zip(given, moved, strict=True):
            to[other_slot] = from_[slot]
        inputs.append(moved)
    moved_run = run_step(step, engine.params, alone, inputs)
    expected = [out for _, out in active_micro_turns(mixed, slot)]
    assert_same(expected, [out for _, out in active_micro_turns(moved_run, other_slot)], exact=False)


def test_a_slot_that_is_not_active_keeps_its_state_bit_for_bit_and_is_silent(engine, step):
    inputs = mixed_inputs(engine.duplex, SLOTS, 12, (0,) * SLOTS)
    state = engine.duplex.init_state(SLOTS, 1)
    paused = 0
    for micro_turn, given in enumerate(inputs):
        before = jax.device_get(state)
        given = given._replace(active=np.arange(SLOTS) != (micro_turn % 2))
        state, out = step(engine.params, state, given)
        after, slot = jax.device_get(state), micro_turn % 2
        paused += int(before.spoke[slot])
        jax.tree.map(lambda a, b, slot=slot: np.testing.assert_array_equal(a[slot], b[slot]), before, after)
        assert not np.any(out.wave[slot]) and not out.speaking[slot] and out.count[slot] == 0
        assert (np.asarray(out.frames[slot]) == SILENT_BINS).all()
    assert paused, "no slot was paused while it spoke"


def test_listening_is_exact_silence_once_the_voice_has_rung_out(mixed):
    rung = silent = 0
    for slot in range(SLOTS):
        spoke = [False]
        for _, out in active_micro_turns(mixed, slot):
            if out.speaking:
                assert np.isfinite(out.wave).all() and np.abs(out.wave).max() > 1e-4
            elif spoke[-1]:
                rung += int(np.abs(out.wave).max() > 0)
            else:
                assert not out.wave.any()
                silent += 1
            spoke.append(bool(out.speaking))
    assert rung and silent
