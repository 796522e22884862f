"""What a speech engine gives and what the rest of the data code takes: an utterance with the times of its words.

An engine (`espeak`, `flite`, `kokoro`, `piper`) returns a `Rendering`: a wave at its own rate and the moment each word
starts. `finish` turns it into an `Utterance` on our terms: 16 kHz, one loudness, cut to the sound itself, so that the
last word ends where the voice really ends (the labels of "the user has finished" hang on that). Called by `voices`.

Axis glossary: N samples, F frames of 5 ms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import soxr

from jaxtml.errors import InputError
from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import SAMPLE_RATE

FRAME = SAMPLE_RATE // 200  # 5 ms: the resolution of word ends
FLOOR_DB = 40.0  # a frame this far below the utterance's loud frames is silence; soft final fricatives lie above it
SPEECH_RMS = 0.06  # every engine at one loudness (-24 dBFS over its sounding frames), so that a gain means something
PEAK = 0.95
EDGE = 40  # samples of fade at both cuts (2.5 ms): no click where a tail was cut

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)*|[,.;:!?]")


@dataclass(frozen=True)
class Utterance:
    """One text spoken once by one voice.

    Attributes:
      wave: `[N]` float32, 16 kHz; starts and ends with sound, not silence.
      words: lower case, no punctuation; times in seconds from the first sample, `words[-1].end_s` is the wave's end.
      voice: `engine:name`, see `voices`.
      text: what was asked for, with its punctuation.
    """

    wave: np.ndarray
    words: tuple[Word, ...]
    voice: str
    text: str


@dataclass(frozen=True)
class Rendering:
    """An engine's own output: `[N]` float32 at `rate_hz`, and for each word of the text the second where it starts."""

    wave: np.ndarray
    rate_hz: float
    starts_s: tuple[float, ...]


def tokens_of(text: str) -> list[str]:
    """Words (lower case) and punctuation marks of a text, in order. Hyphens separate words; digits are refused."""
    lowered = text.lower().replace("-", " ").replace("’", "'")
    if odd := re.search(r"[^a-z',.;:!?\s]", lowered):
        raise InputError(f"text to speak has {odd.group()!r} in {text!r}: write numbers and signs as words")
    return _TOKEN.findall(lowered)


def plain(text: str) -> str:
    """The text as its tokens, words one space apart: what engines read, so that characters in it can be counted."""
    return re.sub(r" (?=[,.;:!?])", "", " ".join(tokens_of(text)))


def words_of(text: str) -> list[str]:
    """The words of a text as they are labelled: lower case, no punctuation."""
    words = [token for token in tokens_of(text) if token[0].isalpha()]
    if not words:
        raise InputError(f"text to speak has no words: {text!r}")
    return words


def sounding(wave: np.ndarray) -> np.ndarray:
    """`[N]` at 16 kHz -> `[F]` bool: the 5 ms frames within `FLOOR_DB` of the utterance's loud ones (95 % quantile)."""
    frames = np.pad(wave, (0, -len(wave) % FRAME)).reshape(-1, FRAME)
    power = np.mean(np.square(frames, dtype=np.float64), axis=1)
    return power > max(float(np.quantile(power, 0.95)) * 10 ** (-FLOOR_DB / 10), 1e-10)


def finish(rendering: Rendering, voice: str, text: str) -> Utterance:
    """A rendering as an `Utterance`: resampled, levelled, trimmed to its sound, every word ending with its sound.

    A word reaches from the engine's start to the last sounding frame before the next word's start: pauses belong to no
    word. The start moves to its first sounding frame (the closure before "two" is silent).
    """
    words = words_of(text)
    if len(words) != len(rendering.starts_s):
        raise ValueError(f"{voice} timed {len(rendering.starts_s)} words of {len(words)} in {text!r}")
    wave = soxr.resample(rendering.wave.astype(np.float32), rendering.rate_hz, SAMPLE_RATE, quality="HQ")
    active = np.flatnonzero(sounding(wave))
    if not len(active) or not np.isfinite(wave).all():
        raise ValueError(f"{voice} gave no sound for {text!r}")
    first, last = int(active[0]), int(active[-1]) + 1
    # Edges between words in frames. At least one frame each, in order: an engine may place two words on one moment.
    edges = [first]
    for start_s in rendering.starts_s[1:]:
        edges.append(max(edges[-1] + 1, round(start_s * SAMPLE_RATE / FRAME)))
    edges.append(max(edges[-1] + 1, last))
    spoken = []
    for text_of_word, low, high in zip(words, edges, edges[1:], strict=False):
        inside = active[(active >= low) & (active < high)]
        begin, end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (low, high)
        spoken.append((text_of_word, begin - first, end - first))
    last = max(last, first + spoken[-1][2])

    cut = wave[first * FRAME : last * FRAME].copy()
    cut = np.pad(cut, (0, (last - first) * FRAME - len(cut)))
    level = np.sqrt(np.mean(np.square(cut.reshape(-1, FRAME)[active[active < last] - first])))
    cut *= min(SPEECH_RMS / level, PEAK / np.abs(cut).max())
    fade = np.linspace(0.0, 1.0, EDGE, dtype=np.float32)
    cut[:EDGE] *= fade
    cut[-EDGE:] *= fade[::-1]
    second = FRAME / SAMPLE_RATE
    times = tuple(Word(word, begin * second, end * second) for word, begin, end in spoken)
    return Utterance(cut, times, voice, text)
