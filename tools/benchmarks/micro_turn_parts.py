#!/usr/bin/env python3
"""Shows where the time of a micro-turn goes on this machine, and how many forward passes real micro-turns take.

It prints two tables:

- The micro-turns of a session over a recording, by what the model does in them: tokens, forward passes, and the time of
  the step. "Tokens a pass" counts the passes that verify guessed text: how many tokens each of them gives.
- The parts of a micro-turn of one or more sessions. Each part is compiled by itself and runs many times in a row. A
  whole step takes longer than its parts: it also chooses tokens, copies, and starts.

Run it alone on the machine, because other work changes the times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtml.commands.arguments import add_checkpoint, add_recording, count, run_tool, tool_parser
from jaxtml.model.duplex import step
from jaxtml.model.duplex.grammar import Phase, Progress
from jaxtml.model.duplex.state import DuplexState, empty_inputs, init_state
from jaxtml.model.spec import Params
from jaxtml.session.batch import SessionBatch, SessionInput
from jaxtml.session.engine import Engine
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.layout import SPEECH_DIM
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, MICRO_TURN_SAMPLES
from jaxtml.strict_json import dumps

Row = dict[str, float]
Part = Callable[[Params, DuplexState], tuple[DuplexState, Any]]


def micro_turn_rows(engine: Engine, wave: np.ndarray) -> dict[str, Row]:
    """Runs one session over `wave` `[N]` and returns the rows of the first table. The first micro-turn is left out."""
    session = SessionBatch(engine, 1)
    groups: defaultdict[str, list[tuple[int, int, int, float]]] = defaultdict(list)
    spoke = False
    for start in range(0, len(wave) - MICRO_TURN_SAMPLES + 1, MICRO_TURN_SAMPLES):
        host, (record,) = session.step([SessionInput(wave[start : start + MICRO_TURN_SAMPLES])])
        tokens, passes, speaks = int(host.count[0]), int(host.passes[0]), bool(host.speaking[0])
        writes = tokens > 1
        name = ("speaks" if spoke else "begins to speak") if speaks else "listens"
        groups[f"{name} and writes" if writes else name].append((tokens, passes, passes - 1 - speaks, record.step_ms))
        spoke = speaks
    groups[next(iter(groups))].pop(0)
    return {name: _summary(group) for name, group in sorted(groups.items()) if group}


def _summary(group: list[tuple[int, int, int, float]]) -> Row:
    tokens, passes, verifying, ms = zip(*group, strict=True)
    return {
        "micro-turns": len(group),
        "tokens": statistics.mean(tokens),
        "passes": statistics.mean(passes),
        "most passes": max(passes),
        "tokens a pass": (sum(tokens) - len(group)) / sum(verifying) if sum(verifying) else 0.0,
        "ms": statistics.median(ms),
        "ms, 95th percentile": float(np.percentile(ms, 95)),
    }


def part_rows(engine: Engine, sessions: int, rounds: int) -> dict[str, float]:
    """Returns the milliseconds of each part of a micro-turn of `sessions` sessions, medians over `rounds` runs."""
    model, one_cpu = engine.duplex.model, engine.duplex.one_cpu
    config = model.config
    inputs = empty_inputs(config.duplex, sessions)
    everyone = jnp.ones((sessions,), bool)
    hidden = jnp.zeros((sessions, config.backbone.d_model))
    silent = jnp.zeros((sessions,), jnp.int32)

    def run_pass(width: int, params: Params, state: DuplexState) -> tuple[DuplexState, Any]:
        x = jnp.zeros((sessions, width, config.backbone.d_model))
        return step.forward(model, params, state, x, everyone * width)

    def verify(params: Params, state: DuplexState) -> tuple[DuplexState, Any]:
        progress = Progress(jnp.full((sessions,), Phase.TEXT), silent)
        out = step.nothing_generated(model, everyone, trace=False)
        carry = (progress, state, out, silent, hidden)
        _, state, *rest = step.verify(model, params, carry, trace=False)
        return state, rest

    def flow(params: Params, state: DuplexState) -> tuple[DuplexState, Any]:
        noise = jnp.ones((sessions, FRAMES_PER_MICRO_TURN, SPEECH_DIM))
        frames = jnp.broadcast_to(hidden[:, None], (sessions, FRAMES_PER_MICRO_TURN, hidden.shape[1]))
        return state, model.bind(params).flow.sample(frames, state.own_mels, noise, config.flow.steps)

    def vocode(params: Params, state: DuplexState) -> tuple[DuplexState, Any]:
        fine = step.nothing_generated(model, everyone, trace=False).fine
        return step.vocode(model, params, state, fine, everyone, everyone, one_cpu)

    parts: dict[str, Part] = {
        "prefill without text": lambda params, state: step.prefill(model, params, state, inputs, one_cpu),
        "logits": lambda params, state: (state, model.logits(params, hidden + state.own_mels[:, :1])),
        "pass of 1 position": partial(run_pass, 1),
        "pass of own speech, 4 positions": partial(run_pass, FRAMES_PER_MICRO_TURN),
        "pass that verifies text": verify,
        "flow head, four frames": flow,
        "vocoder": vocode,
    }
    return {name: _time(part, engine.params, init_state(model, sessions), rounds) for name, part in parts.items()}


def _time(part: Part, params: Params, state: DuplexState, rounds: int) -> float:
    """Returns the median milliseconds of `part`. It takes the state that it returned before, as in a session."""
    compiled = jax.jit(part, donate_argnums=1)
    state, _ = jax.block_until_ready(compiled(params, state))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(params, state))
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def benchmark(args: argparse.Namespace) -> None:
    engine = Engine.load(args.checkpoint)
    wave = read_audio(args.recording)
    micro_turns = micro_turn_rows(engine, wave)
    parts = part_rows(engine, args.sessions, args.rounds)
    if args.json:
        print(dumps({"micro_turns": micro_turns, "parts_ms": parts}))
        return
    table = Table("micro-turn", *next(iter(micro_turns.values())))
    for name, row in micro_turns.items():
        table.add_row(name, *(f"{value:.2f}".removesuffix(".00") for value in row.values()))
    Console(width=120).print(table)
    table = Table("part", f"ms, {args.sessions} session(s)")
    for name, ms in parts.items():
        table.add_row(name, f"{ms:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/micro_turn_parts.py --sessions 6")
    add_checkpoint(parser)
    add_recording(parser, "what the user says")
    parser.add_argument("--sessions", type=count, default=1, help="sessions side by side in the parts (default: 1)")
    parser.add_argument("--rounds", type=count, default=100, help="repetitions of each part (default: 100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, benchmark)
