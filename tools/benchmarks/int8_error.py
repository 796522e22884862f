#!/usr/bin/env python3
"""Measures what rounding the experts changes: int8 experts, and bfloat16 experts, against those of the checkpoint.

Over the demo's recording: the relative difference of all logits, the largest single difference, the share of positions
where the likeliest token stays the same, and the largest change of P(speak), the probability that the gate opens.

With `--data`, also over generated conversations of the split "test" that training has not read: the perplexity of the
tokens that the model has to write (heard words, its own text, the gate), and how often the likeliest token is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.checkpoint.files import SHIPPED, TOKENIZER
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.commands.arguments import add_checkpoint, count, run_tool, tool_parser
from jaxtml.config import Config
from jaxtml.data.dataset import open_dataset
from jaxtml.data.rows import Row, pad
from jaxtml.model.experts.weights import quantise_experts
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import Params
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.encoding import encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control, PositionKind, Term

RECORDING = SHIPPED.parent / "demo" / "human.flac"

Logits = Callable[[Row], np.ndarray]
"""Returns the logits `[T, V]` float32 of one row."""


def make_logits(config: Config, placement: Placement, params: Params) -> Logits:
    model = InteractionModel(config, placement)

    @jax.jit
    def forward(params: Params, inputs: Inputs) -> jax.Array:
        return model.logits(params, model.hidden(params, inputs, jnp.dtype("float32"))[0])

    def logits(row: Row) -> np.ndarray:
        return np.asarray(forward(params, Inputs(*(jnp.asarray(row[name])[None] for name in Inputs._fields))))[0]

    return logits


def round_experts(params: Params) -> Params:
    """Returns the tree with the routed experts rounded to bfloat16."""
    if "w13" in params and "router" in params:
        rounded = {name: params[name].astype(jnp.bfloat16).astype(params[name].dtype) for name in ("w13", "w2")}
        return {**params, **rounded}
    return {name: round_experts(part) if isinstance(part, dict) else part for name, part in params.items()}


def compare(name: str, exact: np.ndarray, rounded: np.ndarray, config: Config) -> None:
    """Prints how far the logits `[T, V]` of rounded experts are from the exact ones."""
    listen, speak = (config.duplex.control_base + token for token in (Control.LISTEN, Control.SPEAK))
    gates = [1 / (1 + np.exp(side[:, listen] - side[:, speak])) for side in (exact, rounded)]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    same = (rounded.argmax(axis=1) == exact.argmax(axis=1)).mean()
    largest, moved = np.abs(rounded - exact).max(), np.abs(gates[0] - gates[1]).max()
    print(f"{name}: logits differ by {error:.2%} of their norm, by {largest:.2f} at most;")
    print(f"  the likeliest token is the same at {same:.1%} of {len(exact)} positions, P(speak) moves by {moved:.3f}")


def score(name: str, logits: Logits, rows: list[Row]) -> None:
    """Prints the perplexity of what the model has to write in `rows`, and how often the likeliest token is right."""
    losses, right = [], []
    for row in rows:
        at = np.flatnonzero(row["term"] != Term.NONE)
        scores, target = logits(row)[at].astype(np.float64), row["target"][at]
        losses.append(np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(at)), target])
        right.append(scores.argmax(axis=1) == target)
    loss, correct = np.concatenate(losses), np.concatenate(right)
    right_at = f"{correct.mean():.2%} of {len(loss)} positions"
    print(f"{name}: perplexity {np.exp(loss.mean()):.4f}, the likeliest token is right at {right_at}")


def measure(args: argparse.Namespace) -> None:
    config, params = load_checkpoint(args.checkpoint)
    codec = TextCodec.load(Path(args.checkpoint) / TOKENIZER)
    dataset = None if args.data is None else open_dataset(config, codec, args.data, "test")
    wave = read_audio(RECORDING)
    wave = np.pad(wave, (0, -len(wave) % MICRO_TURN_SAMPLES))
    recording = pad(encode(Conversation(wave, np.zeros_like(wave)), codec, config.duplex), config)
    present = recording["kind"] != PositionKind.PAD
    models = {
        "float32": make_logits(config, Placement(), params),
        "bfloat16": make_logits(config, Placement(), round_experts(params)),
        "int8": make_logits(config, Placement(int8=True), quantise_experts(params)),
    }
    exact = models["float32"](recording)[present]
    for name in ("bfloat16", "int8"):
        compare(f"{name} experts", exact, models[name](recording)[present], config)
    if dataset is not None:
        rows = [dataset.row(index) for index in range(args.rows)]
        for name, logits in models.items():
            score(f"{name} experts", logits, rows)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/int8_error.py --checkpoint jaxtml/assets/tiny --data DATA")
    add_checkpoint(parser)
    parser.add_argument("--data", type=Path, help="what `jaxtml data` wrote (default: the recording alone)")
    parser.add_argument("--rows", type=count, default=50, help="conversations of --data to score (default: 50)")
    run_tool(parser, measure)
