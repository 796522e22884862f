"""The pitch of a recorded voice, as labels for the vocoder's pitch output. Called by `jaxtml.train.vocoder.data`.

Autocorrelation after Boersma (1993, "Accurate short-term analysis of the fundamental frequency and the
harmonics-to-noise ratio of a sampled sound"): the autocorrelation of a windowed frame is divided by the window's own.
The best path through the candidates of all frames pays a price for octave jumps and for changes of voicing. NumPy, on
the host, once per recording.

Axes: N samples, F fine frames, L lags, C candidates per frame (the last one says "no pitch").
"""

from __future__ import annotations

import numpy as np

from jaxtml.stream.timebase import FINE_HOP, SAMPLE_RATE

LOW_HZ, HIGH_HZ = 60.0, 480.0
_WINDOW = 800  # samples, 50 ms: three periods of the lowest pitch
_FFT = 2048
_CANDIDATES = 8  # with a pitch
_BLOCK = 1024  # frames at a time, to bound the memory
_UNVOICED = 0.45  # a frame whose autocorrelation is lower is better called unvoiced
# Bonus per octave for the higher pitch: multiples of a period correlate as well as the period itself.
_OCTAVE_BONUS = 0.03
_JUMP_PRICE = 0.35  # per octave between neighbouring frames
_SWITCH_PRICE = 0.14  # for a start or an end of voicing


def track_pitch(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pitch of a recording: `[F]` Hz float32, 0 where unvoiced, and `[F]` bool, whether voiced.

    Args:
      wave: `[N]` float32 at 16 kHz, N a multiple of 200. Entry i of the result holds at sample 200 (i + 1), the end of
        hop i.
    """
    hz, score = _find_candidates(np.asarray(wave, np.float64))
    path = _best_path(hz, score)
    rows = np.arange(len(hz))
    voiced = path < _CANDIDATES
    return np.where(voiced, hz[rows, path], 0.0).astype(np.float32), voiced


def _find_candidates(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns Hz and score `[F, C]` of the highest peaks of every frame's autocorrelation, then of "no pitch"."""
    frames = len(wave) // FINE_HOP
    half = _WINDOW // 2
    padded = np.pad(wave, (half, half))
    window = np.hanning(_WINDOW + 1)[:-1]
    lags = np.arange(int(SAMPLE_RATE / HIGH_HZ) - 1, int(SAMPLE_RATE / LOW_HZ) + 2)
    window_correlation = np.fft.irfft(np.abs(np.fft.rfft(window, _FFT)) ** 2)[lags] / np.sum(window**2)
    hz = np.ones((frames, _CANDIDATES + 1))
    score = np.full((frames, _CANDIDATES + 1), -1.0)
    for first in range(0, frames, _BLOCK):
        starts = np.arange(first, min(first + _BLOCK, frames)) * FINE_HOP + FINE_HOP
        block = padded[starts[:, None] + np.arange(_WINDOW)]
        block = (block - block.mean(axis=1, keepdims=True)) * window
        power = np.fft.irfft(np.abs(np.fft.rfft(block, _FFT)) ** 2)
        # 1e-6 is about -80 dBFS: nothing below is voiced.
        correlation = power[:, lags] / (power[:, :1] + 1e-6) / window_correlation
        peak_hz, height = _refine_peaks(correlation, lags)
        best = np.argsort(-height, axis=1)[:, :_CANDIDATES]
        rows = slice(first, first + len(starts))
        hz[rows, :_CANDIDATES] = np.take_along_axis(peak_hz, best, axis=1)
        score[rows, :_CANDIDATES] = np.take_along_axis(height, best, axis=1)
    score[:, _CANDIDATES] = _UNVOICED
    return hz, score


def _refine_peaks(correlation: np.ndarray, lags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a parabola at each lag `[F, L]`; returns Hz and score `[F, L - 2]` of the peaks, score -1 where none is."""
    middle, left, right = correlation[:, 1:-1], correlation[:, :-2], correlation[:, 2:]
    curve = left - 2 * middle + right
    shift = np.where(np.abs(curve) > 1e-9, 0.5 * (left - right) / np.where(np.abs(curve) > 1e-9, curve, 1.0), 0.0)
    shift = np.clip(shift, -0.5, 0.5)
    hz = SAMPLE_RATE / (lags[1:-1] + shift)
    height = middle - 0.25 * (left - right) * shift + _OCTAVE_BONUS * np.log2(hz / LOW_HZ)
    return hz, np.where((middle >= left) & (middle > right), height, -1.0)


def _best_path(hz: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns the candidate chosen in each frame, `[F]` (Viterbi)."""
    octaves = np.log2(hz)
    pitched = np.arange(score.shape[1]) < _CANDIDATES
    both_pitched = pitched[:, None] & pitched[None, :]
    switch_price = np.where(pitched[:, None] ^ pitched[None, :], _SWITCH_PRICE, 0.0)
    total = score[0]
    back = np.zeros(score.shape, np.int64)
    for frame in range(1, len(score)):
        jump_price = _JUMP_PRICE * np.abs(octaves[frame - 1][:, None] - octaves[frame][None, :])
        reached = total[:, None] - np.where(both_pitched, jump_price, switch_price)
        back[frame] = reached.argmax(axis=0)
        total = reached.max(axis=0) + score[frame]
    path = np.empty(len(score), np.int64)
    path[-1] = total.argmax()
    for frame in range(len(score) - 1, 0, -1):
        path[frame - 1] = back[frame, path[frame]]
    return path
