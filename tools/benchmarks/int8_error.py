#!/usr/bin/env python3
"""What int8 experts cost: the shipped model's logits over the demo's recording, against those of its own weights.

tools/benchmarks/int8_error.py [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.data.rows import pad
from jaxtml.model.experts.weights import quantise_experts
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.layout import encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control, PositionKind

ASSETS = Path(__file__).parents[2] / "jaxtml" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ASSETS / "tiny"))
    args = parser.parse_args()
    config, params = load_checkpoint(args.checkpoint)
    wave = read_audio(ASSETS / "demo" / "human.flac")
    wave = np.pad(wave, (0, -len(wave) % MICRO_TURN_SAMPLES))
    codec = TextCodec.load(Path(args.checkpoint) / TOKENIZER)
    row = pad(encode(Conversation(wave, np.zeros_like(wave)), codec, config.duplex), config)
    given = Inputs(*(jnp.asarray(row[name])[None] for name in Inputs._fields))
    present = row["kind"] != PositionKind.PAD

    def logits(placement: Placement, params: dict) -> np.ndarray:
        model = InteractionModel(config, placement)

        def forward(params: dict) -> jax.Array:
            return model.logits(params, model.hidden(params, given, jnp.dtype("float32"))[0])

        return np.asarray(jax.jit(forward)(params))[0, present]

    exact = logits(Placement(), params)
    rounded = logits(Placement(int8=True), quantise_experts(params))
    listen, speak = (config.duplex.control_base + token for token in (Control.LISTEN, Control.SPEAK))
    gates = [1 / (1 + np.exp(a[:, listen] - a[:, speak])) for a in (exact, rounded)]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    same = (rounded.argmax(axis=1) == exact.argmax(axis=1)).mean()
    most, moved = np.abs(rounded - exact).max(), np.abs(gates[0] - gates[1]).max()
    print(f"{len(exact)} positions: logits differ by {error:.2%} of their norm, by {most:.2f} at most")
    print(f"the likeliest token is the same at {same:.1%} of them, P(speak) moves by {moved:.3f} at most")


if __name__ == "__main__":
    main()
