"""Finds when each word of a recording is said, from its text: alignment with a synthetic reading of the same text.

eSpeak reads the text and reports when it starts each word. Dynamic time warping finds which moment of the reading
sounds like which moment of the recording (the method of the tool aeneas). The result is good to some tens of
milliseconds, enough for a transcript in micro-turns of 200 ms. Called by `jaxtml.data.recordings.amazon_queen`.

Axis glossary: N samples, F frames of 10 ms, C cepstral coefficients; R frames of the recording, S of the reading.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import soxr

from jaxtml.data.voices import espeak
from jaxtml.stream.dmel import mel_filterbank
from jaxtml.stream.timebase import SAMPLE_RATE

READERS = (("en-us", 1.0), ("en-us+f3", 1.0))
"""`(voice, pitch)` of eSpeak. The reading that is most like the recording counts."""

_HOP, _FFT = 160, 512  # samples: 10 ms, 32 ms
_CHANNELS = 58  # mel channels up to 4.7 kHz: recordings may have nothing above
_COEFFICIENTS = 16
_LEAN = 0.35  # extra cost of a step that only one of the two makes, so that the path follows the diagonal in silence


def align(wave: np.ndarray, rate_hz: int, text: str) -> tuple[float, ...]:
    """Returns the second at which each word of the text starts in the recording `[N]` at `rate_hz`."""
    recording = _features(soxr.resample(wave, rate_hz, SAMPLE_RATE))
    best_cost, best = np.inf, ()
    for voice, pitch in READERS:
        reading = espeak.render(text, voice, 1.0, pitch)
        cost, path = _warp(recording, _features(soxr.resample(reading.wave, reading.rate_hz, SAMPLE_RATE)))
        if cost < best_cost:
            frames = np.round(np.array(reading.starts_s) * SAMPLE_RATE / _HOP).astype(int)
            best_cost = cost
            best = tuple(float(path[min(frame, len(path) - 1)]) * _HOP / SAMPLE_RATE for frame in frames)
    return best


def _features(wave: np.ndarray) -> np.ndarray:
    """Returns `[F, 2 C]` cepstra and their slopes, normalised over the recording."""
    padded = np.pad(wave, (_FFT // 2, _FFT))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[: len(wave) + 1 : _HOP]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_FFT), axis=1)))
    mel = power @ np.square(mel_filterbank(_FFT)[:, :_CHANNELS])
    log_mel = np.log(mel + 1e-4 * mel.mean() + 1e-12)
    cepstra = log_mel @ _cosines()
    cepstra[:, 0] *= 0.5  # loudness tells pauses, and should not tell more
    slopes = np.gradient(cepstra, axis=0)
    both = np.concatenate([cepstra, 2 * slopes], axis=1)
    return (both - both.mean(axis=0)) / (both.std(axis=0) + 1e-6)


@cache
def _cosines() -> np.ndarray:
    channels = np.arange(_CHANNELS) + 0.5
    return np.cos(np.pi / _CHANNELS * np.outer(channels, np.arange(_COEFFICIENTS)))


def _warp(recording: np.ndarray, reading: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the mean cost of the cheapest path, and for each of the S frames the first frame of the recording on it.

    The table is filled one anti-diagonal at a time, because all of its cells are independent.
    """
    rows, columns = len(reading), len(recording)
    square = (reading**2).sum(1)[:, None] + (recording**2).sum(1) - 2 * reading @ recording.T
    local = np.sqrt(np.maximum(square, 0) / reading.shape[1])
    cost = np.full((rows + 1, columns + 1), np.inf)
    cost[0, 0] = 0.0
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        step = np.minimum(cost[i - 1, j - 1], np.minimum(cost[i - 1, j], cost[i, j - 1]) + _LEAN)
        cost[i, j] = step + local[i - 1, j - 1]
    first = np.zeros(rows, int)
    i, j = rows, columns
    while i > 0 and j > 0:
        first[i - 1] = j - 1
        moves = (cost[i - 1, j - 1], cost[i - 1, j] + _LEAN, cost[i, j - 1] + _LEAN)
        move = int(np.argmin(moves))
        i, j = i - (move != 2), j - (move != 1)
    return float(cost[rows, columns]) / (rows + columns), first
