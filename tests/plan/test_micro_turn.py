"""A plan counts the passes that a run of the program makes, and the collectives of the compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import jax
import numpy as np
import pytest

from jaxtml.model import backbone
from jaxtml.model.backbone import Backbone
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.interaction import InteractionModel
from jaxtml.parallel.mesh import MeshShape, make_mesh
from jaxtml.parallel.work import Case, Work, count_jaxpr_work
from jaxtml.plan.micro_turn import Course, MicroTurnProgram, Turn
from jaxtml.plan.programs import make_serving_program, trace_program
from tests.model.duplex.running import mixed_inputs, two_layers

MICRO_TURNS = 30


def count_passes(program: MicroTurnProgram, turn: Turn, confirmed: float) -> int:
    parts = program.parts(program.course(turn, confirmed))
    return sum(often * sum(work.passes.values()) for work, often in parts)


def test_a_run_makes_the_passes_that_the_plan_counts(small, lively, monkeypatch):
    mesh = MeshShape()
    _, jaxpr = trace_program(partial(make_serving_program, small, mesh, "tpu"), mesh)
    program = MicroTurnProgram.measure(jaxpr, "tpu", ())

    ran: list[int] = []  # positions of each pass
    forward = Backbone.forward_cached

    def counted(self, layers, x, *rest):
        jax.debug.callback(lambda: ran.append(x.shape[1]))
        return forward(self, layers, x, *rest)

    monkeypatch.setattr(Backbone, "forward_cached", counted)
    duplex = Duplex(InteractionModel(small))
    params, step, state = jax.jit(duplex.prepare)(lively(small)), jax.jit(duplex.step), duplex.init_state(1, 3)
    seen = set()
    for inputs in mixed_inputs(duplex, 1, MICRO_TURNS, starts=(0,)):
        ran.clear()
        state, out = step(params, state, inputs)
        jax.block_until_ready(state)
        jax.effects_barrier()
        if not inputs.active[0]:
            continue
        given = bool(inputs.typed_length[0] or inputs.patch_count[0])
        turn = Turn(given, int(out.count[0]) - 1, bool(out.speaking[0]))
        # Guessed tokens may be confirmed. Without guesses, both bounds are the same.
        most, least = (count_passes(program, turn, confirmed) for confirmed in (0, math.inf))
        assert least <= len(ran) <= most, turn
        assert ran[0] == (program.wide if given else program.narrow).positions
        assert set(ran[1:]) <= {program.round_positions, program.speech.positions}
        seen.add((given, turn.written > 0, turn.speaks))
    assert {flag for turn in seen for flag in enumerate(turn)} == {(i, b) for i in range(3) for b in (False, True)}


def collectives_in_hlo(text: str, rounds: int) -> int:
    """Counts the collectives of a compiled program, each as often as its loops run.

    Of the branches of a condition, the one with the most collectives counts. A loop of unknown length runs `rounds`
    times.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$", line):
            lines = computations[head[2]] = []
            entry = head[2]  # the entry is the last computation
        lines.append(line)

    def count(name: str) -> int:
        total = 0
        for line in computations[name]:
            called = dict(re.findall(r"(body|condition|to_apply|calls|\w+_computation)=%?([\w.-]+)", line))
            if re.search(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(", line):
                total += 1
            elif "body" in called:
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                times = int(known[1]) if known else rounds
                total += times * count(called["body"]) + (times + 1) * count(called["condition"])
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                total += max(count(branch.strip(" %")) for branch in branches[1].split(","))
            elif "true_computation" in called:
                total += max(count(branch) for branch in called.values())
            else:
                total += sum(count(inner) for inner in called.values())
        return total

    return count(entry)


@pytest.mark.parametrize("many", [False, True], ids=["few tokens", "many tokens"])
def test_the_compiled_program_has_the_collectives_that_the_plan_counts(small, many, monkeypatch):
    if many:
        monkeypatch.setattr(backbone, "MAX_GROUP_BYTES", 0)
    sliding = dataclasses.replace(small.backbone.sliding, n_kv_heads=2)
    config = two_layers(dataclasses.replace(small, backbone=dataclasses.replace(small.backbone, sliding=sliding)), 1)
    shape = MeshShape(expert=2, tensor=2)
    with jax.set_mesh(make_mesh(shape, jax.devices()[:4])):
        program = make_serving_program(config, shape, "cpu")
        traced = jax.jit(program.function).trace(*program.arguments)
        compiled = traced.lower().compile().as_text()
    for rounds in (0, 3):
        counted = count_jaxpr_work(traced.jaxpr, "cpu", Case(rounds)).calls
        assert sum(counted.values()) == collectives_in_hlo(compiled, rounds) > 8


def work(positions: int, passes: int = 1) -> Work:
    made = Work()
    made.passes[4, positions] = passes
    return made


def test_a_round_of_the_loop_writes_a_token_and_those_that_are_confirmed():
    program = MicroTurnProgram(work(5), work(40), work(5), work(4))
    assert program.course(Turn(False, 3, True), 0) == Course(False, 3, True)
    assert program.course(Turn(False, 3, True), 1) == Course(False, 2, True)
    assert program.course(Turn(True, 11, True), 99) == Course(True, 3, True)  # a round confirms four guesses at most
    parts = program.parts(Course(False, 2, True))
    assert [(work.positions, often) for work, often in parts] == [(5, 1), (5, 2), (4, 1)]


def test_a_session_that_only_listens_needs_one_pass():
    program = MicroTurnProgram(work(5), work(40), work(5), work(4))
    assert program.parts(program.course(Turn(False, 0, False), np.inf)) == [(program.narrow, 1)]
