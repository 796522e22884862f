"""The pitch of a recorded voice, as labels for the vocoder's pitch output. Called by `train.vocoder.training`.

Autocorrelation after Boersma (1993, "Accurate short-term analysis of the fundamental frequency ..."): the windowed
frame's autocorrelation over the window's own; the best path through each frame's candidates, octave jumps and voicing
changes having a price. numpy, on the host, once per utterance.

Axes: N samples, F fine frames, L lags, C candidates per frame (the last one says "no pitch").
"""

from __future__ import annotations

import numpy as np

from jaxtml.stream.timebase import FINE_HOP, SAMPLE_RATE

LOW_HZ, HIGH_HZ = 60.0, 480.0
_WINDOW = 800  # 50 ms: three periods of the lowest pitch
_FFT = 2048
_CANDIDATES = 8
_UNVOICED = 0.45  # autocorrelation below which a frame is better called unvoiced
_OCTAVE = 0.03  # per octave, in favour of the higher pitch: a period's multiples correlate as well as it does
_JUMP = 0.35  # per octave between neighbouring frames
_SWITCH = 0.14  # for starting or ending voice


def pitch_track(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[N]` float32 at 16 kHz, N a multiple of 200 -> (`[N / 200]` Hz float32, `[N / 200]` bool: voiced).

    Entry i holds at sample 200 (i + 1), the end of hop i. Hz of unvoiced frames is 0.
    """
    hz, score = _candidates(np.asarray(wave, np.float64))
    path = _best_path(hz, score)
    rows = np.arange(len(hz))
    voiced = path < _CANDIDATES
    return np.where(voiced, hz[rows, path], 0.0).astype(np.float32), voiced


def _candidates(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hz and score `[F, C]` of the strongest peaks of every frame's autocorrelation, then the unvoiced candidate."""
    frames = len(wave) // FINE_HOP
    half = _WINDOW // 2
    padded = np.pad(wave, (half, half))
    window = np.hanning(_WINDOW + 1)[:-1]
    lags = np.arange(int(SAMPLE_RATE / HIGH_HZ) - 1, int(SAMPLE_RATE / LOW_HZ) + 2)
    own = np.fft.irfft(np.abs(np.fft.rfft(window, _FFT)) ** 2)[lags] / np.sum(window**2)
    hz = np.ones((frames, _CANDIDATES + 1))
    score = np.full((frames, _CANDIDATES + 1), -1.0)
    for first in range(0, frames, 1024):
        starts = np.arange(first, min(first + 1024, frames)) * FINE_HOP + FINE_HOP
        block = padded[starts[:, None] + np.arange(_WINDOW)]
        block = (block - block.mean(axis=1, keepdims=True)) * window
        full = np.fft.irfft(np.abs(np.fft.rfft(block, _FFT)) ** 2)
        r = full[:, lags] / (full[:, :1] + 1e-6) / own  # 1e-6: about -80 dBFS, below which nothing is voiced
        middle, left, right = r[:, 1:-1], r[:, :-2], r[:, 2:]
        curve = left - 2 * middle + right
        shift = np.where(np.abs(curve) > 1e-9, 0.5 * (left - right) / np.where(np.abs(curve) > 1e-9, curve, 1.0), 0.0)
        exact = SAMPLE_RATE / (lags[1:-1] + np.clip(shift, -0.5, 0.5))
        height = middle - 0.25 * (left - right) * np.clip(shift, -0.5, 0.5) + _OCTAVE * np.log2(exact / LOW_HZ)
        height = np.where((middle >= left) & (middle > right), height, -1.0)
        best = np.argsort(-height, axis=1)[:, :_CANDIDATES]
        rows = slice(first, first + len(starts))
        hz[rows, :_CANDIDATES] = np.take_along_axis(exact, best, axis=1)
        score[rows, :_CANDIDATES] = np.take_along_axis(height, best, axis=1)
    score[:, _CANDIDATES] = _UNVOICED
    return hz, score


def _best_path(hz: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Viterbi: `[F]` index of the candidate chosen in each frame."""
    octaves = np.log2(hz)
    spoken = np.arange(score.shape[1]) < _CANDIDATES
    total = score[0]
    back = np.zeros(score.shape, np.int64)
    for frame in range(1, len(score)):
        price = _JUMP * np.abs(octaves[frame - 1][:, None] - octaves[frame][None, :])
        price = np.where(
            spoken[:, None] & spoken[None, :], price, np.where(spoken[:, None] ^ spoken[None, :], _SWITCH, 0.0)
        )
        reach = total[:, None] - price
        back[frame] = reach.argmax(axis=0)
        total = reach.max(axis=0) + score[frame]
    path = np.empty(len(score), np.int64)
    path[-1] = total.argmax()
    for frame in range(len(score) - 1, 0, -1):
        path[frame - 1] = back[frame, path[frame]]
    return path
