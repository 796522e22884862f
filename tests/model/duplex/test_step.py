"""One micro-turn as one program: the same model as in training, sessions that know nothing of each other, a grammar
that holds whatever the weights say, and silence that is silent."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import Config
from jaxtml.model.duplex import cpu_batches
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.duplex.state import DuplexState, MicroTurnInputs, MicroTurnOutputs
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.spec import init_params
from jaxtml.stream.clock import WEEK_MS, clock_features
from jaxtml.stream.dmel import SILENT_BINS
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control, PositionKind

SLOTS = 4
STARTS = (0, 3, 7, 1)  # the micro-turn in which each slot's session begins
TURNS = 45  # about 500 positions a session: twelve windows of the global layers, forty of the sliding ones
SOON = WEEK_MS - 5 * MICRO_TURN_MS  # wall clock at the start: the week ends during the session


class Run(NamedTuple):
    """Sessions that ran side by side: what went in and came out, on the host, and the state at the end."""

    inputs: list[MicroTurnInputs]
    outputs: list[MicroTurnOutputs]
    state: DuplexState


def mixed_inputs(duplex: Duplex, batch: int, turns: int, starts: tuple[int, ...] = STARTS) -> list[MicroTurnInputs]:
    """Random frames; typed text and patches now and then; slots that begin late and pause."""
    rng = np.random.default_rng(5)
    c = duplex.model.config.duplex
    made = []
    for turn in range(turns):
        typed = rng.integers(0, c.control_base, (batch, c.max_typed), dtype=np.int32)
        typed[:, 0] = c.control_base + Control.TYPED
        some = rng.random((2, batch)) < 0.2
        inputs = MicroTurnInputs(
            bins=rng.integers(0, 16, (batch, 4, 80), dtype=np.uint8),
            typed=typed,
            typed_length=(some[0] * rng.integers(2, c.max_typed + 1, batch)).astype(np.int32),
            patches=rng.standard_normal((batch, c.max_patches, 2, 40, 40, 3)).astype(np.float32),
            patch_count=(some[1] * rng.integers(1, c.max_patches + 1, batch)).astype(np.int32),
            active=np.array([turn >= start for start in starts]) & (rng.random(batch) < 0.9),
        )
        made.append(inputs)  # pyright: ignore[reportArgumentType]
    return made


def ran(step: Any, params: Any, state: DuplexState, inputs: list[MicroTurnInputs]) -> Run:
    outputs = []
    for given in inputs:
        state, out = step(params, state, given)
        outputs.append(jax.device_get(out))
    return Run(inputs, outputs, jax.device_get(state))


@pytest.fixture(scope="module")
def mixed(engine, step) -> Run:
    """Four sessions of different age with everything a micro-turn can hold."""
    inputs = mixed_inputs(engine.duplex, SLOTS, TURNS)
    return ran(step, engine.params, engine.duplex.init_state(SLOTS, 3, SOON), inputs)


def turns_of(run: Run, slot: int) -> list[tuple[MicroTurnInputs, MicroTurnOutputs]]:
    """The micro-turns in which this slot was active, its own row of everything."""
    pairs = [jax.tree.map(lambda a: a[slot], (given, out)) for given, out in zip(run.inputs, run.outputs, strict=True)]
    return [(given, out) for given, out in pairs if given.active]


def sequence_of(
    turns: list[tuple[MicroTurnInputs, MicroTurnOutputs]], base: int
) -> tuple[dict[str, list], list[int], list]:
    """A session as the training forward reads it, rebuilt from inputs and outputs alone.

    With the positions that predict the generated tokens, and the logits that the session had there.
    """
    rows: dict[str, list] = {"kind": [], "ids": [], "bins": [], "clock": [], "patches": []}
    at: list[int] = []
    logits: list[np.ndarray] = []
    nothing = np.zeros(80, np.uint8)

    def add(kind: PositionKind, token: int = 0, bins: np.ndarray = nothing, turn: int = 0) -> None:
        rows["kind"].append(kind)
        rows["ids"].append(token)
        rows["bins"].append(bins)
        rows["clock"].append(clock_features(np.array(turn), np.array((SOON + MICRO_TURN_MS * turn) % WEEK_MS)))

    before = SILENT_BINS
    for turn, (given, out) in enumerate(turns):
        add(PositionKind.TURN, base + Control.TURN, turn=turn)
        for token in given.typed[: given.typed_length]:
            add(PositionKind.TEXT, int(token))
        for patch in given.patches[: given.patch_count]:
            add(PositionKind.PATCH)
            rows["patches"].append(patch)
        for frame in given.bins:
            add(PositionKind.USER, bins=frame)
        for token, row in zip(out.tokens[: out.count], out.logits, strict=False):
            at.append(len(rows["kind"]) - 1)
            logits.append(row)
            add(PositionKind.TEXT, int(token))
        if out.speaking:
            for frame in (before, *out.frames[:3]):
                add(PositionKind.OWN, bins=frame)
        before = out.frames[3] if out.speaking else SILENT_BINS
    return rows, at, logits


def test_a_replay_through_the_training_forward_gives_the_same_logits(engine, params, mixed):
    base = engine.config.duplex.control_base
    sessions = [sequence_of(turns_of(mixed, slot), base) for slot in range(SLOTS)]
    longest = max(len(rows["kind"]) for rows, _, _ in sessions)
    assert longest > 10 * engine.config.backbone.global_.window
    seen = [out for slot in range(SLOTS) for _, out in turns_of(mixed, slot)]
    assert 0.2 < np.mean([out.speaking for out in seen]) < 0.8

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
    model = InteractionModel(engine.config)
    forward = jax.jit(lambda p, x: model.logits(p, model.hidden(p, x, jnp.dtype("float32"))[0]))
    replayed = np.asarray(forward(params, inputs))
    for slot, (_, at, logits) in enumerate(sessions):
        np.testing.assert_allclose(replayed[slot, at], np.stack(logits), atol=5e-5, err_msg=f"slot {slot}")


def test_a_long_session_of_mixed_inputs_compiles_nothing_more(engine, step, compilations):
    duplex = engine.duplex
    inputs = mixed_inputs(duplex, SLOTS, 60) + [jax.device_get(duplex.empty_inputs(SLOTS))] * 20
    state, _ = step(engine.params, duplex.init_state(SLOTS), inputs[0])
    before = len(compilations)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    arrays = None
    for turn, given in enumerate(inputs):
        state, out = step(engine.params, state, given)
        del out
        if turn == 10:
            arrays = len(jax.live_arrays())
    assert len(compilations) == before
    assert len(jax.live_arrays()) == arrays, "memory grows with the session"
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    assert int(state.position.max()) > 10 * engine.config.backbone.global_.window


def test_the_step_as_a_jitted_function_is_traced_once(engine, params):
    traces = []

    def step(*args: Any) -> Any:
        traces.append(1)
        return engine.duplex.step(*args)

    jitted = jax.jit(step, donate_argnums=1)
    state = engine.duplex.init_state(SLOTS)
    for given in mixed_inputs(engine.duplex, SLOTS, 6, (0,) * SLOTS):
        state, _ = jitted(engine.params, state, given)
    assert len(traces) == 1


def assert_same(a: list[MicroTurnOutputs], b: list[MicroTurnOutputs], exact: bool) -> None:
    """Equal choices; equal numbers too, up to the rounding of products of other shapes unless `exact`."""
    for turn, (x, y) in enumerate(zip(a, b, strict=True)):
        for name in ("tokens", "count", "speaking", "frames"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name), err_msg=f"turn {turn}: {name}")
        for name in ("wave", "p_speak", "logits"):
            np.testing.assert_allclose(
                getattr(x, name), getattr(y, name), rtol=0, atol=0 if exact else 1e-4, err_msg=f"turn {turn}: {name}"
            )


def test_the_same_seed_gives_the_same_session_and_another_seed_another_voice(engine, step, mixed):
    again = ran(step, engine.params, engine.duplex.init_state(SLOTS, 3, SOON), mixed.inputs)
    assert_same(mixed.outputs, again.outputs, exact=True)
    other = ran(step, engine.params, engine.duplex.init_state(SLOTS, 4, SOON), mixed.inputs)
    assert any((a.frames != b.frames).any() for a, b in zip(mixed.outputs, other.outputs, strict=True))


@pytest.mark.parametrize(("slot", "place"), [(0, 0), (2, 0), (1, 3)])
def test_a_session_depends_neither_on_its_neighbours_nor_on_its_slot(engine, step, mixed, slot, place):
    alone = engine.duplex.init_state(SLOTS, 3, SOON)
    alone = alone._replace(key=alone.key.at[place].set(jnp.array([3, slot], jnp.uint32)))
    inputs = []
    for given in mixed.inputs:
        moved = jax.tree.map(np.zeros_like, given)
        for from_, to in zip(given, moved, strict=True):
            to[place] = from_[slot]
        inputs.append(moved)
    moved_run = ran(step, engine.params, alone, inputs)
    there = [out for _, out in turns_of(mixed, slot)]
    assert_same(there, [out for _, out in turns_of(moved_run, place)], exact=False)


def test_a_slot_that_is_not_active_keeps_its_state_bit_for_bit_and_is_silent(engine, step):
    inputs = mixed_inputs(engine.duplex, SLOTS, 12, (0,) * SLOTS)
    state = engine.duplex.init_state(SLOTS, 1)
    paused = 0
    for turn, given in enumerate(inputs):
        before = jax.device_get(state)
        given = given._replace(active=np.arange(SLOTS) != (turn % 2))
        state, out = step(engine.params, state, given)
        after, slot = jax.device_get(state), turn % 2
        paused += int(before.spoke[slot])
        jax.tree.map(lambda a, b, slot=slot: np.testing.assert_array_equal(a[slot], b[slot]), before, after)
        assert not np.any(out.wave[slot]) and not out.speaking[slot] and out.count[slot] == 0
        assert (np.asarray(out.frames[slot]) == SILENT_BINS).all()
    assert paused, "no slot was paused while it spoke"


def parsed(tokens: list[int], base: int) -> tuple[list[int] | None, list[int] | None, int]:
    """Heard tokens, said tokens (None: the part is absent) and the gate of one micro-turn."""
    heard = said = None
    rest = list(tokens)
    if rest[0] == base + Control.HEARD:
        rest.pop(0)
        heard = []
        while rest[0] < base:
            heard.append(rest.pop(0))
    if rest[0] == base + Control.SAY:
        rest.pop(0)
        said = []
        while rest[0] < base or rest[0] in (base + Control.DELEGATE, base + Control.END):
            said.append(rest.pop(0))
    (gate,) = rest
    return heard, said, gate - base


def test_the_grammar_and_the_limits_of_a_micro_turn_hold_for_any_weights(engine, mixed):
    c = engine.config.duplex
    parts = []
    for slot in range(SLOTS):
        for _, out in turns_of(mixed, slot):
            heard, said, gate = parsed(out.tokens[: out.count].tolist(), c.control_base)
            assert gate == (Control.SPEAK if out.speaking else Control.LISTEN)
            assert len(heard or []) <= c.max_heard and len(said or []) <= c.max_text
            assert not out.tokens[out.count :].any()
            assert out.speaking == (out.p_speak > c.gate_threshold)
            parts.append((heard, said))
    assert max(len(heard or []) for heard, _ in parts) == c.max_heard
    assert max(len(said or []) for _, said in parts) == c.max_text
    assert any(heard is None for heard, _ in parts) and any(said is None for _, said in parts)


def test_listening_is_exact_silence_once_the_voice_has_rung_out(mixed):
    rung = silent = 0
    for slot in range(SLOTS):
        spoke = [False]
        for _, out in turns_of(mixed, slot):
            if out.speaking:
                assert np.isfinite(out.wave).all() and np.abs(out.wave).max() > 1e-4
            elif spoke[-1]:
                rung += int(np.abs(out.wave).max() > 0)
            else:
                assert not out.wave.any()
                silent += 1
            spoke.append(bool(out.speaking))
    assert rung and silent


def two_layers(small: Config, **duplex: Any) -> Config:
    """The small model with one layer of each kind: quick to compile with other limits."""
    backbone = dataclasses.replace(small.backbone, n_layers=2, n_dense=1, global_layers=(1,))
    steps = duplex.pop("steps")
    return dataclasses.replace(
        small,
        backbone=backbone,
        duplex=dataclasses.replace(small.duplex, **duplex),
        flow=dataclasses.replace(small.flow, steps=steps),
    )


def session(config: Config, turns: int, batch: int = 2, seed: int = 0) -> Run:
    duplex = Duplex(InteractionModel(config), trace=True)
    params = jax.jit(duplex.prepare)(init_params(duplex.model.specs(), 0))
    inputs = mixed_inputs(duplex, batch, turns, (0,) * batch)
    return ran(duplex.compiled(params, batch), params, duplex.init_state(batch, seed), inputs)


def test_a_cpu_that_runs_few_slots_at_a_time_gives_what_one_that_runs_all_gives(small, monkeypatch):
    config, batch = two_layers(small, steps=1), 5
    monkeypatch.setattr(cpu_batches, "CPU_BATCH", batch)
    whole = session(config, 16, batch)
    spoke = np.array([out.speaking for out in whole.outputs])
    assert spoke.any(axis=1).any() and (spoke.sum(axis=1) > 2).any(), "nothing of interest is compared"
    monkeypatch.setattr(cpu_batches, "CPU_BATCH", 2)
    parts = session(config, 16, batch)
    assert_same(whole.outputs, parts.outputs, exact=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), whole.state.layers, parts.state.layers)
    np.testing.assert_array_equal(whole.state.own_frame, parts.state.own_frame)


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 1), (1.0, 3)])
def test_a_gate_threshold_of_0_always_speaks_and_of_1_never_does(small, threshold, steps):
    run = session(two_layers(small, gate_threshold=threshold, heard=False, steps=steps), 12)
    base = small.duplex.control_base
    for slot in range(2):
        for _, out in turns_of(run, slot):
            assert out.speaking == (threshold == 0.0)
            assert bool(out.wave.any()) == (threshold == 0.0)
            assert base + Control.HEARD not in out.tokens[: out.count], "a config without `heard` transcribes nothing"


def allowed(tokens: list[int], config: Config) -> np.ndarray:
    """`[V]` bool: what may follow these tokens of a micro-turn."""
    c = config.duplex
    base = c.control_base
    mask = np.zeros(config.backbone.vocab_size, bool)
    mask[[base + Control.LISTEN, base + Control.SPEAK]] = True
    said = base + Control.SAY in tokens
    opened = tokens.index(base + Control.SAY) if said else 0
    if not said:
        mask[base + Control.SAY] = True
        if not tokens:
            mask[base + Control.HEARD] = True
        elif len(tokens) - 1 < c.max_heard:
            mask[:base] = True
    elif len(tokens) - 1 - opened < c.max_text:
        mask[:base] = True
        mask[[base + Control.DELEGATE, base + Control.END]] = True
    return mask


def test_sampling_stays_inside_the_nucleus_and_follows_its_chances(small):
    config = two_layers(small, temperature=0.7, top_p=0.8, steps=4)
    base = config.duplex.control_base
    run = session(config, 100)
    expected, spread, met, greedy = 0.0, 0.0, 0, 0
    for slot in range(2):
        for _, out in turns_of(run, slot):
            tokens = out.tokens[: out.count].tolist()
            for i, token in enumerate(tokens):
                logits = np.where(allowed(tokens[:i], config), out.logits[i], -np.inf).astype(np.float64) / 0.7
                chance = np.exp(logits - logits.max())
                chance /= chance.sum()
                order = np.argsort(-chance)
                kept = order[np.cumsum(chance[order]) - chance[order] < 0.8 + 1e-6]
                gates = [base + Control.LISTEN, base + Control.SPEAK]
                assert token in kept or (token in gates and set(gates) & set(kept))
                gate = chance[[g for g in gates if g in kept]].sum() / chance[kept].sum()
                expected, spread, met = expected + gate, spread + gate * (1 - gate), met + (token in gates)
                greedy += token == order[0]
    assert greedy < 0.9 * sum(out.count.sum() for out in run.outputs)
    assert abs(met - expected) < 4 * spread**0.5, f"{met} gates, {expected:.1f} expected"


def test_sampling_differs_from_seed_to_seed_and_repeats_with_one(small):
    config = two_layers(small, temperature=0.7, top_p=0.8, steps=4)
    first, again, other = (session(config, 10, seed=seed) for seed in (0, 0, 1))
    assert_same(first.outputs, again.outputs, exact=True)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first.outputs, other.outputs, strict=True))
