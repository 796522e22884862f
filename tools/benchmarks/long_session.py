#!/usr/bin/env python3
"""Runs one session for hours of its own time, and shows that a request at its beginning is still attended to.

The user types a request in the first second. Then a recording is played to the model now and then (`--talk`), with
silence between, as fast as the model computes. The model has the weights of a checkpoint, with another window and with
retained tokens. The weights need not have been trained for that: the tool measures time, memory and attention, and no
behaviour.

The result has, for each tenth of the session: the median and the 99th percentile of a step's time, separately for
micro-turns that only listen, that write text and are silent, and that speak; the memory of the process; how many
tokens have been retained. At the end it says how far back the request stands, and how much of its attention the next
micro-turn gives to the request: for each global layer, the share of the head that gives it the most.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from jaxtml import config as configs
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.source import read_parameters
from jaxtml.checkpoint.tokenizer import load_tokenizer
from jaxtml.commands.arguments import add_checkpoint, add_recording, count, number, run_tool, tool_parser
from jaxtml.errors import InputError
from jaxtml.model.attention.cache import KVCache, SecondRing, plan_cache_step
from jaxtml.model.duplex.state import DuplexState, MicroTurnOutputs
from jaxtml.model.spec import bind
from jaxtml.session.engine import Engine
from jaxtml.session.records import SlotInput
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.clock import clock_features
from jaxtml.stream.dmel import SILENT_BINS, user_dmel
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, MICRO_TURN_MS, MICRO_TURN_SAMPLES, N_MELS
from jaxtml.stream.tokens import Control
from jaxtml.strict_json import dumps

REQUEST = "remind me of the number forty two"
REQUEST_AT = 5  # micro-turn in which the request begins: its tokens are not pinned
PARTS = 10
SILENCE = np.tile(SILENT_BINS, (FRAMES_PER_MICRO_TURN, 1))


def load_engine(args: argparse.Namespace) -> Engine:
    """Returns the checkpoint's model with the window and the retained tokens of the command line."""
    source, codec = open_checkpoint(args.checkpoint), load_tokenizer(args.checkpoint)
    config, extent = source.config, source.config.backbone.global_.rel_extent
    if args.window < extent:
        raise InputError(f"--window {args.window}: give at least {extent}, the reach of the checkpoint's relative bias")
    for name in ("window", "retained"):
        config = configs.override(config, f"backbone.global_.{name}={getattr(args, name)}")
    configs.validate(config)
    return Engine.create(config, read_parameters(source), codec)


class Session:
    """One session, step by step, with what the steps took.

    Attributes:
      state: the session's state.
      times: for each sort of micro-turn, the milliseconds of its steps since `times` was cleared.
    """

    def __init__(self, engine: Engine):
        self.engine, self.state = engine, engine.init_state(1)
        self.times: dict[str, list[float]] = defaultdict(list)
        self._empty, self._step = engine.empty_inputs(1), engine.compiled_step(1)

    def hear(self, bins: np.ndarray, text: tuple[int, ...] = ()) -> None:
        """Runs one micro-turn in which the user says `bins` `[4, 80]` and types `text`."""
        began = time.perf_counter()
        inputs = self.engine.make_inputs(self._empty, {0: SlotInput(bins, text)})
        self.state, out = self._step(self.engine.params, self.state, inputs)
        jax.block_until_ready(out)
        self.times[sort_of(out)].append(1000 * (time.perf_counter() - began))

    @property
    def retained(self) -> int:
        """How many tokens have been retained so far."""
        assert self.state.retained is not None
        return int(self.state.retained.count[0])


def sort_of(out: MicroTurnOutputs) -> str:
    """Returns what the session did in a micro-turn: "speak", "write" text without speaking, or only "listen"."""
    if out.speaking[0]:
        return "speak"
    return "write" if out.count[0] > 1 else "listen"


def attention_to(engine: Engine, state: DuplexState, positions: np.ndarray) -> list[float]:
    """Returns the share of attention that the next micro-turn's TURN and user frames give to retained tokens.

    There is one share for each global layer: the largest among its heads and the tokens that run here. A head's output
    is the mean of all values, weighted by attention. So if the values of the tokens in question are one and all others
    are zero, the output is the share. The values of the tokens that run here are in the output too; a second output,
    without the ones, is subtracted to leave them out.

    Args:
      engine: the model.
      state: the session.
      positions: `[N]`, where the tokens in question stand in the session.
    """
    model, retained = engine.duplex.model, state.retained
    assert retained is not None and model.backbone.unrolled
    trunk, dtype = model.bind(engine.params), engine.duplex.dtype
    clock = trunk.clock(clock_features(state.micro_turn, state.week_ms, jnp), dtype)
    turn = trunk.embed(jnp.full((1,), engine.config.duplex.control_base + Control.TURN), dtype) + clock
    x = jnp.concatenate([turn[:, None], trunk.audio(jnp.asarray(SILENCE)[None], dtype)], axis=1)
    length = jnp.full((1,), x.shape[1])
    shares = []
    layer_states: Any = state.layers  # one for each layer, as the backbone is unrolled
    for kind, weights, layer_state in zip(model.backbone.kinds(), engine.params["layers"], layer_states, strict=True):
        attention = engine.config.backbone.global_ if kind.is_global else engine.config.backbone.sliding
        cache = layer_state.cache
        slots = cache.k.shape[-1]
        step = plan_cache_step(attention, slots, state.position, length, x.shape[1], retained)
        if kind.is_global:
            heads = {**weights["attn"], "wo": jnp.eye(*weights["attn"]["wo"].shape)}
            module = bind(model.backbone.modules[kind], {**weights, "attn": heads})
            asked = jnp.isin(retained.position[0], positions)
            tails, nothing = layer_state[1:3], jnp.zeros_like(cache.v)
            outs = []
            for one in (asked, jnp.zeros_like(asked)):
                values = one.astype(dtype)[:, None] * jnp.ones_like(cache.far.v)
                marked = KVCache(cache.k, nothing, SecondRing(cache.far.k, values))
                outs.append(module.attn(module.attn_norm(x), step, marked, tails)[0])
            shares.append(float((outs[0] - outs[1]).max()))
        x, _, _ = bind(model.backbone.modules[kind], weights)(x, jnp.ones(x.shape[:2], jnp.int32), step, layer_state)
    return shares


def run(engine: Engine, bins: np.ndarray, hours: float, talk: float) -> dict[str, Any]:
    """Runs the session and returns the result. `bins` `[M, 4, 80]` is the recording; `talk` its share of the time."""
    session, text = Session(engine), engine.codec.encode(REQUEST)
    room = engine.config.duplex.max_typed - 1
    for _ in range(REQUEST_AT):
        session.hear(SILENCE)
    for start in range(0, len(text), room):
        session.hear(SILENCE, tuple(text[start : start + room]))
    assert session.state.retained is not None
    request = np.asarray(session.state.retained.position[0, : session.retained])
    micro_turns, period = round(hours * 3_600_000 / MICRO_TURN_MS), round(len(bins) / talk)
    parts: list[dict[str, Any]] = []
    for part in range(PARTS):
        session.times.clear()
        for micro_turn in range(part * micro_turns // PARTS, (part + 1) * micro_turns // PARTS):
            place = micro_turn % period
            session.hear(bins[place] if place < len(bins) else SILENCE)
        times = {
            sort: {"count": len(ms), "p50_ms": float(np.median(ms)), "p99_ms": float(np.percentile(ms, 99))}
            for sort, ms in sorted(session.times.items())
        }
        memory = psutil.Process().memory_info().rss
        parts.append({"step": times, "memory_bytes": memory, "retained": session.retained})
    return {
        "micro_turns": micro_turns,
        "tokens": int(session.state.position[0]),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(session.state)),
        "parts": parts,
        "request_tokens": len(request),
        "request_tokens_back": int(session.state.position[0] - request.max()),
        "attention_to_request": attention_to(engine, session.state, request),
    }


def benchmark(args: argparse.Namespace) -> None:
    engine = load_engine(args)
    wave = read_audio(args.recording)
    wave = wave[: len(wave) // MICRO_TURN_SAMPLES * MICRO_TURN_SAMPLES]
    if not len(wave):
        raise InputError(f"{args.recording} is shorter than 200 ms: give a longer recording")
    bins = user_dmel(wave).reshape(-1, FRAMES_PER_MICRO_TURN, N_MELS)
    result = run(engine, bins, args.hours, args.talk)
    if args.json:
        print(dumps(result))
        return
    table = Table("tenth", "listen p50, p99 ms", "write p50, p99 ms", "speak p50, p99 ms", "MB", "retained")
    for n, part in enumerate(result["parts"]):
        steps = [part["step"].get(sort) for sort in ("listen", "write", "speak")]
        cells = [f"{step['p50_ms']:.2f}, {step['p99_ms']:.2f}" if step else "-" for step in steps]
        table.add_row(str(n + 1), *cells, f"{part['memory_bytes'] / 1e6:.0f}", f"{part['retained']:,}")
    console = Console()
    console.print(table)
    console.print(
        f"{result['micro_turns']:,} micro-turns, {result['tokens']:,} tokens, {result['state_bytes']:,} bytes\n"
        f"the request ends {result['request_tokens_back']:,} tokens back; the most attentive head of each global layer "
        f"gives it {', '.join(f'{share:.2%}' for share in result['attention_to_request'])} of its attention"
    )


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/long_session.py --hours 8 --talk 0.02")
    add_checkpoint(parser)
    add_recording(parser, "what the user says now and then")
    parser.add_argument("--hours", type=number(0.001, 24), default=8, help="hours that the session lasts (default: 8)")
    parser.add_argument(
        "--talk",
        type=number(0.0001, 1),
        default=0.02,
        help="share of the session in which the recording plays (default: 0.02)",
    )
    parser.add_argument("--window", type=count, default=512, help="tokens that global layers see (default: 512)")
    parser.add_argument("--retained", type=count, default=4096, help="tokens that they retain (default: 4096)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, benchmark)
