"""Cutting, joining, stretching and pausing recorded speech while its word times stay true. Pure numpy.

A `Clip` is a stretch of mono 16 kHz audio with its words; every function gives a new one. Called by
`jaxtml.data.talks.mix`.

Axes: N samples of one clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import SAMPLE_RATE

_BLOCK = 160  # samples, 10 ms: the grain at which loudness is judged
_FADE = 80  # samples, 5 ms: enough that a cut does not click
_SILENT_DB = 38.0  # a block this far below the loudest one is silence


@dataclass(frozen=True)
class Clip:
    """Speech with its words.

    Attributes:
      wave: `[N]` float32.
      words: in order, times in seconds from the first sample.
    """

    wave: np.ndarray
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def _block_power(wave: np.ndarray) -> np.ndarray:
    """`[N // 160]` mean square of each 10 ms."""
    blocks = wave[: len(wave) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    return np.einsum("bt,bt->b", blocks, blocks) / _BLOCK


def speech_level(wave: np.ndarray) -> float:
    """Root mean square over the 10 ms blocks that hold speech (within 20 dB of the loudest)."""
    power = _block_power(wave)
    if not len(power) or power.max() <= 0:
        return 0.0
    return float(np.sqrt(power[power > power.max() * 1e-2].mean()))


def faded(wave: np.ndarray, samples: int = _FADE) -> np.ndarray:
    """The wave with both ends brought to zero over `samples`."""
    wave = wave.astype(np.float32, copy=True)
    n = min(samples, len(wave) // 2)
    ramp = np.arange(n, dtype=np.float32) / max(n, 1)
    wave[:n] *= ramp
    wave[len(wave) - n :] *= ramp[::-1]
    return wave


def _moved(words: Sequence[Word], shift_s: float, length_s: float) -> tuple[Word, ...]:
    """Word times moved by `shift_s` and kept inside `[0, length_s]`."""
    return tuple(
        Word(w.text, min(max(w.start_s + shift_s, 0.0), length_s), min(max(w.end_s + shift_s, 0.0), length_s))
        for w in words
    )


def trimmed(clip: Clip, margin: int = 160) -> Clip:
    """Without the silence around it, but for `margin` samples: its last sample is the acoustic end."""
    power = _block_power(clip.wave)
    if not len(power) or power.max() <= 0:
        return clip
    loud = np.flatnonzero(power > power.max() * 10 ** (-_SILENT_DB / 10))
    start = max(int(loud[0]) * _BLOCK - margin, 0)
    end = min(int(loud[-1] + 1) * _BLOCK + margin, len(clip.wave))
    wave = faded(clip.wave[start:end])
    return Clip(wave, _moved(clip.words, -start / SAMPLE_RATE, len(wave) / SAMPLE_RATE))


def at_rate(clip: Clip, rate: float) -> Clip:
    """Played `rate` times as fast, pitch and formants with it, band-limited (resampled in the frequency domain)."""
    # Both lengths are rounded to 64 samples so that the transforms stay fast; the rate that results scales the words.
    n = -(-len(clip.wave) // 64) * 64
    m = max(round(n / rate / 64), 1) * 64
    if n == m:
        return clip
    spectrum = np.fft.rfft(np.pad(clip.wave, (0, n - len(clip.wave))).astype(np.float32))
    wave = np.fft.irfft(spectrum[: m // 2 + 1], m).astype(np.float32) * np.float32(m / n)
    wave = wave[: round(len(clip.wave) * m / n)]
    scaled = [replace(w, start_s=w.start_s * m / n, end_s=w.end_s * m / n) for w in clip.words]
    return Clip(wave, _moved(scaled, 0.0, len(wave) / SAMPLE_RATE))


def levelled(clip: Clip, level: float) -> Clip:
    """With its speech at the root mean square `level`."""
    now = speech_level(clip.wave)
    return replace(clip, wave=clip.wave * np.float32(level / now)) if now > 0 else clip


def _quietest(wave: np.ndarray, low: int, high: int) -> int:
    """The sample in `[low, high]` around which 10 ms are the quietest."""
    low, high = max(low, _BLOCK // 2), min(high, len(wave) - _BLOCK // 2)
    if high <= low:
        return (low + high) // 2
    energy = np.concatenate(
        [[0.0], np.cumsum(np.square(wave[low - _BLOCK // 2 : high + _BLOCK // 2], dtype=np.float64))]
    )
    return low + int(np.argmin(energy[_BLOCK:] - energy[:-_BLOCK]))


def boundary(clip: Clip, k: int) -> int:
    """The sample at which to cut between word `k - 1` and word `k`: the quietest near their aligned edge."""
    left, right = clip.words[k - 1].end_s * SAMPLE_RATE, clip.words[k].start_s * SAMPLE_RATE
    low, high = int(min(left, right)) - 320, int(max(left, right)) + 320  # alignments are true to about 20 ms
    middle_left = int((clip.words[k - 1].start_s + clip.words[k - 1].end_s) / 2 * SAMPLE_RATE)
    middle_right = int((clip.words[k].start_s + clip.words[k].end_s) / 2 * SAMPLE_RATE)
    return _quietest(clip.wave, max(low, middle_left), min(high, middle_right))


def with_pause(clip: Clip, k: int, pause: int) -> Clip:
    """With `pause` samples of silence before word `k`."""
    at = boundary(clip, k)
    silence = np.zeros(pause, np.float32)
    wave = np.concatenate([faded(clip.wave[:at]), silence, faded(clip.wave[at:])])
    at_s, length_s = at / SAMPLE_RATE, len(wave) / SAMPLE_RATE
    before = [replace(w, start_s=min(w.start_s, at_s), end_s=min(w.end_s, at_s)) for w in clip.words[:k]]
    after = [replace(w, start_s=max(w.start_s, at_s), end_s=max(w.end_s, at_s)) for w in clip.words[k:]]
    return Clip(wave, (*_moved(before, 0.0, length_s), *_moved(after, pause / SAMPLE_RATE, length_s)))


def single_word(clip: Clip, k: int) -> Clip:
    """Word `k` alone, cut out at the quietest places beside it."""
    start = boundary(clip, k) if k else 0
    end = boundary(clip, k + 1) if k + 1 < len(clip.words) else len(clip.wave)
    wave = clip.wave[start:end]
    return trimmed(Clip(wave, _moved(clip.words[k : k + 1], -start / SAMPLE_RATE, len(wave) / SAMPLE_RATE)), margin=80)


def joined(clips: Sequence[Clip], gaps: Sequence[int]) -> Clip:
    """The clips one after the other with `gaps[i]` samples of silence after clip `i`; one gap fewer than clips."""
    waves: list[np.ndarray] = []
    words: list[Word] = []
    at = 0
    for clip, gap in zip(clips, (*gaps, 0), strict=True):
        words += [
            replace(w, start_s=w.start_s + at / SAMPLE_RATE, end_s=w.end_s + at / SAMPLE_RATE) for w in clip.words
        ]
        waves += [faded(clip.wave), np.zeros(gap, np.float32)]
        at += len(clip.wave) + gap
    return Clip(np.concatenate(waves), tuple(words))
