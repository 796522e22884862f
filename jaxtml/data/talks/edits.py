"""Cuts, joins, stretches and pauses recorded speech while the times of its words stay true. Pure numpy.

Most functions take a `Clip` and return a new one. Called by the other modules of `jaxtml.data.talks`.

Axis glossary: N samples of one clip, B blocks of 10 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import SAMPLE_RATE

_BLOCK = 160  # samples, 10 ms: the unit in which loudness is judged
_FADE = 80  # samples, 5 ms: enough that a cut does not click
_SILENT_DB = 38.0  # a block this far below the loudest one is silence


@dataclass(frozen=True)
class Clip:
    """A stretch of mono 16 kHz speech with its words.

    Attributes:
      wave: `[N]` float32.
      words: in order, times in seconds from the first sample.
    """

    wave: np.ndarray
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """The words with spaces between them."""
        return " ".join(word.text for word in self.words)


def _block_power(wave: np.ndarray) -> np.ndarray:
    """Returns `[B]` the mean square of each whole block."""
    blocks = wave[: len(wave) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    return np.einsum("bt,bt->b", blocks, blocks) / _BLOCK


def speech_level(wave: np.ndarray) -> float:
    """Returns the root mean square over the blocks that hold speech: those within 20 dB of the loudest block."""
    power = _block_power(wave)
    if not len(power) or power.max() <= 0:
        return 0.0
    return float(np.sqrt(power[power > power.max() * 1e-2].mean()))


def fade_ends(wave: np.ndarray, samples: int = _FADE) -> np.ndarray:
    """Returns a copy of `[N]` that rises from zero over its first `samples` and falls to zero over its last ones."""
    wave = wave.astype(np.float32, copy=True)
    n = min(samples, len(wave) // 2)
    ramp = np.arange(n, dtype=np.float32) / max(n, 1)
    wave[:n] *= ramp
    wave[len(wave) - n :] *= ramp[::-1]
    return wave


def _shift_words(words: Sequence[Word], shift_s: float, length_s: float) -> tuple[Word, ...]:
    """Returns the words with their times shifted by `shift_s` and kept inside `[0, length_s]`."""
    return tuple(
        Word(w.text, min(max(w.start_s + shift_s, 0.0), length_s), min(max(w.end_s + shift_s, 0.0), length_s))
        for w in words
    )


def trim(clip: Clip, margin: int = 160) -> Clip:
    """Removes the silence around the sound, except for `margin` samples. The last sample is then the acoustic end."""
    power = _block_power(clip.wave)
    if not len(power) or power.max() <= 0:
        return clip
    loud = np.flatnonzero(power > power.max() * 10 ** (-_SILENT_DB / 10))
    start = max(int(loud[0]) * _BLOCK - margin, 0)
    end = min(int(loud[-1] + 1) * _BLOCK + margin, len(clip.wave))
    wave = fade_ends(clip.wave[start:end])
    return Clip(wave, _shift_words(clip.words, -start / SAMPLE_RATE, len(wave) / SAMPLE_RATE))


def change_rate(clip: Clip, rate: float) -> Clip:
    """Plays the clip `rate` times as fast. Pitch and formants rise by the same factor.

    The result is band-limited, because it is resampled in the frequency domain. Both lengths are rounded to multiples
    of 64 samples so that the transforms stay fast. This changes the rate a little, and the word times follow the rate
    that results.
    """
    n = -(-len(clip.wave) // 64) * 64
    m = max(round(n / rate / 64), 1) * 64
    if n == m:
        return clip
    spectrum = np.fft.rfft(np.pad(clip.wave, (0, n - len(clip.wave))).astype(np.float32))
    wave = np.fft.irfft(spectrum[: m // 2 + 1], m).astype(np.float32) * np.float32(m / n)
    wave = wave[: round(len(clip.wave) * m / n)]
    scaled = [replace(w, start_s=w.start_s * m / n, end_s=w.end_s * m / n) for w in clip.words]
    return Clip(wave, _shift_words(scaled, 0.0, len(wave) / SAMPLE_RATE))


def set_level(clip: Clip, level: float) -> Clip:
    """Scales the clip so that its speech has the root mean square `level`. Silence stays silent."""
    current = speech_level(clip.wave)
    return replace(clip, wave=clip.wave * np.float32(level / current)) if current > 0 else clip


def _quietest(wave: np.ndarray, low: int, high: int) -> int:
    """Returns the sample in `[low, high]` around which one block is the quietest."""
    low, high = max(low, _BLOCK // 2), min(high, len(wave) - _BLOCK // 2)
    if high <= low:
        return (low + high) // 2
    energy = np.concatenate(
        [[0.0], np.cumsum(np.square(wave[low - _BLOCK // 2 : high + _BLOCK // 2], dtype=np.float64))]
    )
    return low + int(np.argmin(energy[_BLOCK:] - energy[:-_BLOCK]))


def cut_position(clip: Clip, k: int) -> int:
    """Returns the sample at which to cut between the words `k - 1` and `k`: the quietest place near their border."""
    left, right = clip.words[k - 1].end_s * SAMPLE_RATE, clip.words[k].start_s * SAMPLE_RATE
    low, high = int(min(left, right)) - 320, int(max(left, right)) + 320  # word times are true to about 20 ms
    middle_left = int((clip.words[k - 1].start_s + clip.words[k - 1].end_s) / 2 * SAMPLE_RATE)
    middle_right = int((clip.words[k].start_s + clip.words[k].end_s) / 2 * SAMPLE_RATE)
    return _quietest(clip.wave, max(low, middle_left), min(high, middle_right))


def insert_pause(clip: Clip, k: int, pause: int) -> Clip:
    """Inserts `pause` samples of silence before word `k`."""
    cut = cut_position(clip, k)
    silence = np.zeros(pause, np.float32)
    wave = np.concatenate([fade_ends(clip.wave[:cut]), silence, fade_ends(clip.wave[cut:])])
    cut_s, length_s = cut / SAMPLE_RATE, len(wave) / SAMPLE_RATE
    before = [replace(w, start_s=min(w.start_s, cut_s), end_s=min(w.end_s, cut_s)) for w in clip.words[:k]]
    after = [replace(w, start_s=max(w.start_s, cut_s), end_s=max(w.end_s, cut_s)) for w in clip.words[k:]]
    return Clip(wave, (*_shift_words(before, 0.0, length_s), *_shift_words(after, pause / SAMPLE_RATE, length_s)))


def cut_word(clip: Clip, k: int) -> Clip:
    """Returns word `k` alone, cut out at the quietest places beside it."""
    start = cut_position(clip, k) if k else 0
    end = cut_position(clip, k + 1) if k + 1 < len(clip.words) else len(clip.wave)
    wave = clip.wave[start:end]
    words = _shift_words(clip.words[k : k + 1], -start / SAMPLE_RATE, len(wave) / SAMPLE_RATE)
    return trim(Clip(wave, words), margin=80)


def join(clips: Sequence[Clip], gaps: Sequence[int]) -> Clip:
    """Joins clips one after the other, with `gaps[i]` samples of silence after clip `i`.

    There is one gap fewer than there are clips.
    """
    waves: list[np.ndarray] = []
    words: list[Word] = []
    start = 0
    for clip, gap in zip(clips, (*gaps, 0), strict=True):
        shift_s = start / SAMPLE_RATE
        words += [replace(w, start_s=w.start_s + shift_s, end_s=w.end_s + shift_s) for w in clip.words]
        waves += [fade_ends(clip.wave), np.zeros(gap, np.float32)]
        start += len(clip.wave) + gap
    return Clip(np.concatenate(waves), tuple(words))
