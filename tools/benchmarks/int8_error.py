#!/usr/bin/env python3
"""Measures what int8 experts change: the logits of a checkpoint over the demo's recording, with and without them.

The figures are the relative difference of all logits, the largest single difference, the share of positions where the
likeliest token stays the same, and the largest change of P(speak), the probability that the gate opens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.checkpoint.files import SHIPPED, TOKENIZER
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.commands.arguments import add_checkpoint, run_tool, tool_parser
from jaxtml.config import Config
from jaxtml.data.rows import pad
from jaxtml.model.experts.weights import quantise_experts
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import Params
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.encoding import encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control, PositionKind

RECORDING = SHIPPED.parent / "demo" / "human.flac"


def logits(config: Config, placement: Placement, params: Params, inputs: Inputs) -> np.ndarray:
    """Returns `[T, V]` float32 logits of the one row of `inputs`."""
    model = InteractionModel(config, placement)

    def forward(params: Params) -> jax.Array:
        return model.logits(params, model.hidden(params, inputs, jnp.dtype("float32"))[0])

    return np.asarray(jax.jit(forward)(params))[0]


def measure(args: argparse.Namespace) -> None:
    config, params = load_checkpoint(args.checkpoint)
    codec = TextCodec.load(Path(args.checkpoint) / TOKENIZER)
    wave = read_audio(RECORDING)
    wave = np.pad(wave, (0, -len(wave) % MICRO_TURN_SAMPLES))
    row = pad(encode(Conversation(wave, np.zeros_like(wave)), codec, config.duplex), config)
    inputs = Inputs(*(jnp.asarray(row[name])[None] for name in Inputs._fields))
    present = row["kind"] != PositionKind.PAD

    exact = logits(config, Placement(), params, inputs)[present]
    rounded = logits(config, Placement(int8=True), quantise_experts(params), inputs)[present]
    listen, speak = (config.duplex.control_base + token for token in (Control.LISTEN, Control.SPEAK))
    gates = [1 / (1 + np.exp(side[:, listen] - side[:, speak])) for side in (exact, rounded)]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    same = (rounded.argmax(axis=1) == exact.argmax(axis=1)).mean()
    largest, moved = np.abs(rounded - exact).max(), np.abs(gates[0] - gates[1]).max()
    print(f"{len(exact)} positions: logits differ by {error:.2%} of their norm, by {largest:.2f} at most")
    print(f"the likeliest token is the same at {same:.1%} of them, P(speak) moves by {moved:.3f} at most")


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/int8_error.py --checkpoint jaxtml/assets/tiny")
    add_checkpoint(parser)
    run_tool(parser, measure)
