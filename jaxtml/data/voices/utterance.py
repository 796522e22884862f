"""An utterance with the times of its words, and the way from an engine's output to an utterance.

An engine (`espeak`, `flite`, `kokoro`, `piper`) returns a `Rendering`: a wave at its own rate, and the time at which
each word starts. `finish` turns a rendering into an `Utterance`: 16 kHz, one loudness, cut to the sound itself. So the
last word ends where the voice ends. The label "the user has finished" depends on that. Called by `registry`.

Axis glossary: N samples, F frames of 5 ms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import soxr

from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import SAMPLE_RATE

FRAME = SAMPLE_RATE // 200
"""Samples of a frame, 5 ms: the resolution of word ends."""

FLOOR_DB = 40.0
"""A frame this far below the loud frames of its utterance is silence. Soft fricatives at the end lie above it."""

SPEECH_RMS = 0.06
"""Loudness of every engine: -24 dBFS over the frames with sound. So a gain means the same for all of them."""

PEAK = 0.95
"""The largest sample. A wave that would exceed it at `SPEECH_RMS` is quieter instead."""

_FADE = 40  # samples at both ends, 2.5 ms: a cut does not click

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)*|[,.;:!?]")


@dataclass(frozen=True)
class Utterance:
    """One text spoken once by one voice.

    Attributes:
      wave: `[N]` float32, 16 kHz. It starts and ends with sound, not with silence.
      words: lower case, no punctuation. Times are seconds from the first sample; `words[-1].end_s` is the wave's end.
      voice: `engine:name`, see `registry`.
      text: the text that was asked for, with its punctuation.
    """

    wave: np.ndarray
    words: tuple[Word, ...]
    voice: str
    text: str


@dataclass(frozen=True)
class Rendering:
    """The output of an engine.

    Attributes:
      wave: `[N]` float32 at `rate_hz`.
      rate_hz: sample rate; no whole number where a pitch was scaled.
      starts_s: second at which each word of the text starts.
    """

    wave: np.ndarray
    rate_hz: float
    starts_s: tuple[float, ...]


def tokens_of(text: str) -> list[str]:
    """Returns the words (lower case) and punctuation marks of a text, in order. Hyphens separate words.

    Raises:
      InputError: the text has digits or signs.
    """
    lowered = text.lower().replace("-", " ").replace("’", "'")
    if unknown := re.search(r"[^a-z',.;:!?\s]", lowered):
        raise InputError(f"text to speak has {unknown.group()!r} in {text!r}: write numbers and signs as words")
    return _TOKEN.findall(lowered)


def plain(text: str) -> str:
    """Returns the text as eSpeak and Flite read it: its tokens, with one space between words.

    eSpeak reports at which character of this text each word starts.
    """
    return re.sub(r" (?=[,.;:!?])", "", " ".join(tokens_of(text)))


def words_of(text: str) -> list[str]:
    """Returns the words of a text as labels have them: lower case, no punctuation.

    Raises:
      InputError: the text has digits or signs, or no words.
    """
    words = [token for token in tokens_of(text) if token[0].isalpha()]
    if not words:
        raise InputError(f"text to speak has no words: {text!r}")
    return words


def sounding(wave: np.ndarray) -> np.ndarray:
    """Returns `[F]` bool: whether each frame of `[N]` samples at 16 kHz has sound.

    A frame has sound if it is within `FLOOR_DB` of the loud frames of the utterance (95 % quantile).
    """
    frames = np.pad(wave, (0, -len(wave) % FRAME)).reshape(-1, FRAME)
    power = np.mean(np.square(frames, dtype=np.float64), axis=1)
    return power > max(float(np.quantile(power, 0.95)) * 10 ** (-FLOOR_DB / 10), 1e-10)


def finish(rendering: Rendering, voice: str, text: str) -> Utterance:
    """Returns a rendering as an utterance: resampled, at one loudness, trimmed to its sound.

    A word reaches from its first frame with sound to its last one before the next word starts. Pauses belong to no
    word, nor does the silent closure before the t of "two".

    Raises:
      ValueError: the engine gave times for another number of words, or gave no sound.
    """
    words = words_of(text)
    if len(words) != len(rendering.starts_s):
        raise ValueError(f"{voice} gave the times of {len(rendering.starts_s)} words, {text!r} has {len(words)}")
    wave = soxr.resample(rendering.wave.astype(np.float32), rendering.rate_hz, SAMPLE_RATE, quality="HQ")
    active = np.flatnonzero(sounding(wave))
    if not len(active) or not np.isfinite(wave).all():
        raise ValueError(f"{voice} gave no sound for {text!r}")
    first, last = int(active[0]), int(active[-1]) + 1
    # Edges between words, in frames. Each word gets at least one frame, because an engine may start two words at once.
    edges = [first]
    for start_s in rendering.starts_s[1:]:
        edges.append(max(edges[-1] + 1, round(start_s * SAMPLE_RATE / FRAME)))
    edges.append(max(edges[-1] + 1, last))
    spoken = []
    for word, (low, high) in zip(words, pairwise(edges), strict=True):
        inside = active[(active >= low) & (active < high)]
        begin, end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (low, high)
        spoken.append((word, begin - first, end - first))
    last = max(last, first + spoken[-1][2])

    cut = wave[first * FRAME : last * FRAME].copy()
    cut = np.pad(cut, (0, (last - first) * FRAME - len(cut)))
    level = np.sqrt(np.mean(np.square(cut.reshape(-1, FRAME)[active[active < last] - first])))
    cut *= min(SPEECH_RMS / level, PEAK / np.abs(cut).max())
    fade = np.linspace(0.0, 1.0, _FADE, dtype=np.float32)
    cut[:_FADE] *= fade
    cut[-_FADE:] *= fade[::-1]
    frame_s = FRAME / SAMPLE_RATE
    timed_words = tuple(Word(word, begin * frame_s, end * frame_s) for word, begin, end in spoken)
    return Utterance(cut, timed_words, voice, text)
