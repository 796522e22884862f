#!/usr/bin/env python3
"""Makes jaxtml/assets/demo/human.flac: ten seconds of a human speaker for `tools/demo`.

The words are spoken by Allison Smith (Asterisk core sounds, CC-BY-SA-3.0; see jaxtml/assets/demo/NOTICE). Training
never hears them. The tool joins them into three user turns, with silence after each in which the model can answer.

Needs the recordings: apt-get install asterisk-core-sounds-en-g722
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
import soundfile

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.commands.arguments import run_tool, tool_parser
from jaxtml.data.talks.recorded_prompts import FOLDER
from jaxtml.errors import InputError
from jaxtml.stream.timebase import SAMPLE_RATE

OUT = SHIPPED.parent / "demo" / "human.flac"
USER_TURNS = (
    ("digits/3", "letters/plus", "digits/4"),
    ("digits/mon-2", "digits/mon-6"),
    ("digits/9", "digits/1", "digits/6"),
)
LEAD_S, GAP_S, SILENCE_S = 0.6, 0.12, 2.6  # before the first user turn, between words, after each user turn
QUIET = 0.02  # share of a word's peak; quieter samples at the start and the end of the word are cut off


def read_word(name: str) -> np.ndarray:
    """Returns one prompt, `[N]` float32 at 16 kHz, without the silence at both ends."""
    path = FOLDER / f"{name}.g722"
    if not path.is_file():
        raise InputError(f"{path} is missing: apt-get install asterisk-core-sounds-en-g722")
    with av.open(str(path), format="g722") as file:
        wave = np.concatenate([frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]) / np.float32(32768)
    loud = np.flatnonzero(np.abs(wave) > QUIET * np.abs(wave).max())
    return wave[loud[0] : loud[-1] + 1]


def make(args: argparse.Namespace) -> None:
    if not args.out.parent.is_dir():
        raise InputError(f"no folder {args.out.parent}: make it first, or give another --out")
    rng = np.random.default_rng(0)

    def silence(seconds: float) -> np.ndarray:
        return (1e-4 * rng.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)

    parts = [silence(LEAD_S)]
    for words in USER_TURNS:
        for number, name in enumerate(words):
            parts += [silence(GAP_S)] * (number > 0) + [read_word(name)]
        parts.append(silence(SILENCE_S))
    wave = np.concatenate(parts)
    soundfile.write(args.out, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    print(f"{args.out}: {len(wave) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/make_demo_recording.py --out /tmp/human.flac")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FLAC", help="default: the demo's recording")
    run_tool(parser, make)
