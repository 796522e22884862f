"""Turns audio into dMel, the 16-level log-mel frames that the model hears.

- A whole recording: `user_dmel(wave)`. `jaxtml.stream.encoding` does so for training data.
- One micro-turn at a time: `DmelStream.step`. Every session does so. The bins equal those of the whole recording, bit
  for bit.
- Inside a compiled step: `quantise_jax`, for the speech that the model feeds back to itself.
- `fine_log_mel` makes the finer frames that the flow head learns to predict and that the vocoder speaks from.

The user's sound is rounded to 16 bits first (`to_16_bits`). The rest of the recipe is the one released with the Inkling
model (`InklingFeatureExtractor` and `InklingProcessor` of transformers 5.23). The tests check that the bins equal the
bins of that code. Everything but `quantise_jax` is numpy on the host.

Axes: N samples at 16 kHz, F frames (coarse: one per 800 samples; fine: one per 200), K FFT bins, 80 mel channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.stream.timebase import (
    DMEL_HOP,
    DMEL_WINDOW,
    FINE_HOP,
    FINE_PER_FRAME,
    FINE_WINDOW,
    FRAMES_PER_MICRO_TURN,
    LOG_MEL_MAX,
    LOG_MEL_MIN,
    MICRO_TURN_SAMPLES,
    N_BINS,
    N_MELS,
    SAMPLE_RATE,
)

_FLOOR = 1e-10  # lower bound of the power before its square root, and of the mel magnitude before its logarithm
_BLOCK = 64 * FRAMES_PER_MICRO_TURN  # frames transformed at a time: bounds the memory for hours of audio, fits caches
_CENTRES = np.linspace(LOG_MEL_MIN, LOG_MEL_MAX, N_BINS).astype(np.float32)
_LEFT_PAD = DMEL_WINDOW - DMEL_HOP


def _bin_edges() -> np.ndarray:
    """Returns `[15]` float32: the smallest number that falls into each of the bins 1..15.

    The released quantiser takes the first `argmin |x - centre|` in float32. Rounding keeps this rule monotone in x, so
    it equals a comparison with fixed edges. The edges are found here once, near the midpoints between centres. A
    comparison is then exact, and the same in numpy and in XLA.
    """
    steps = np.arange(-64, 65)
    middles = ((_CENTRES[1:] + _CENTRES[:-1]) / 2).astype(np.float32)
    spacing = np.spacing(np.abs(middles))  # the distance to the next float32
    candidates = (middles[:, None] + steps * spacing[:, None]).astype(np.float32)  # [15, 129], rising
    below = np.abs(candidates - _CENTRES[:-1, None]) <= np.abs(candidates - _CENTRES[1:, None])
    return candidates[np.arange(N_BINS - 1), below.sum(axis=1)]


_EDGES = _bin_edges()


@lru_cache
def mel_filterbank(n_fft: int) -> np.ndarray:
    """Returns triangular filters `[n_fft // 2 + 1, 80]` float64 from 0 to 8000 Hz.

    Mel scale and area normalisation are Slaney's (Auditory Toolbox, 1998). The scale is linear up to 1 kHz (200 / 3 Hz
    per mel), then logarithmic (27 mels per factor of 6.4). The array is read-only, because all callers share it.
    """
    linear_hz, knee_hz, log_step = 200.0 / 3.0, 1000.0, np.log(6.4) / 27.0
    knee_mel = knee_hz / linear_hz
    top_mel = knee_mel + np.log(SAMPLE_RATE / 2 / knee_hz) / log_step
    mels = np.linspace(0.0, top_mel, N_MELS + 2)
    corners = np.where(mels < knee_mel, mels * linear_hz, knee_hz * np.exp(log_step * (mels - knee_mel)))
    hz = np.linspace(0.0, SAMPLE_RATE / 2, n_fft // 2 + 1)[:, None]
    rising = (hz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - hz) / (corners[2:] - corners[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (corners[2:] - corners[:-2]))
    filters.setflags(write=False)
    return filters


@lru_cache
def _hann(length: int) -> np.ndarray:
    """Returns the periodic Hann window `[length]`, rounded to float32 as in the released code."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def _log_mel_frames(padded: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """Returns the log10 mel magnitudes `[F, 80]` float32 in [-7, 2] of windows of `n_fft` samples, `hop` apart.

    The arithmetic is float64, so that a bin differs from the released one only where the released float32 arithmetic
    errs. The filters are applied to four frames at a time, because `DmelStream` also has four. The rounding of a matrix
    product depends on its shape, so only equal shapes give equal bins.
    """
    windows = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    filters = mel_filterbank(n_fft)
    out = np.empty((len(windows), N_MELS), np.float32)
    for start in range(0, len(windows), _BLOCK):
        block = windows[start : start + _BLOCK]
        spectrum = np.fft.rfft(block * _hann(n_fft).astype(np.float64), axis=-1)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        magnitude = np.sqrt(np.maximum(power, _FLOOR))
        spare = -len(block) % FRAMES_PER_MICRO_TURN
        fours = np.pad(magnitude, ((0, spare), (0, 0))).reshape(-1, FRAMES_PER_MICRO_TURN, magnitude.shape[1])
        mel = np.matmul(fours, filters).reshape(-1, N_MELS)[: len(block)]
        out[start : start + len(block)] = np.log10(np.maximum(mel, _FLOOR))
    return np.clip(out, LOG_MEL_MIN, LOG_MEL_MAX)


def _one_channel(wave: np.ndarray) -> np.ndarray:
    """Returns the wave as float32. Raises `ValueError` unless it has one axis."""
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1:
        raise ValueError(f"audio is one-dimensional, [N] samples; got shape {wave.shape}")
    return wave


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Returns the log-mels `[ceil(N / 800), 80]` float32 in [-7, 2] of `[N]` float32 samples at 16 kHz.

    A window of 100 ms is taken every 50 ms. Windows are causal: the window of frame f ends just before sample
    800 (f + 1). The wave is padded with zeros: before its first sample, and at its end to a multiple of 800 samples.

    Raises:
      ValueError: the wave has more than one axis.
    """
    wave = _one_channel(wave)
    if len(wave) == 0:
        return np.empty((0, N_MELS), np.float32)
    return _log_mel_frames(np.pad(wave, (_LEFT_PAD, -len(wave) % DMEL_HOP)), DMEL_WINDOW, DMEL_HOP)


def fine_log_mel(wave: np.ndarray) -> np.ndarray:
    """Returns the fine log-mels `[N / 200, 80]` float32 in [-7, 2] of `[N]` float32 samples at 16 kHz.

    Frame i is centred on the samples [200 i, 200 i + 200). Its 50 ms window covers [200 i - 300, 200 i + 500), with
    zeros outside the wave. A window looks 300 samples past its hop. That costs no latency, because the model
    predicts fine frames and never reads them as input.

    Raises:
      ValueError: the wave has more than one axis, or N is no multiple of 200.
    """
    wave = _one_channel(wave)
    if len(wave) % FINE_HOP:
        raise ValueError(f"fine_log_mel needs a multiple of {FINE_HOP} samples, got {len(wave)}")
    if len(wave) == 0:
        return np.empty((0, N_MELS), np.float32)
    side = (FINE_WINDOW - FINE_HOP) // 2
    return _log_mel_frames(np.pad(wave, (side, side)), FINE_WINDOW, FINE_HOP)


def quantise(log_mel: np.ndarray) -> np.ndarray:
    """Returns the dMel bins `[..., 80]` uint8 of log-mels `[..., 80]`.

    A bin, 0 to 15, is the number of the nearest of 16 centres from -7 to 2. Ties go to the lower one.
    """
    values = np.asarray(log_mel, np.float32)
    return (values[..., None] >= _EDGES).sum(axis=-1, dtype=np.uint8)


def quantise_jax(log_mel: jax.Array) -> jax.Array:
    """Returns what `quantise` does, inside a compiled program: `[..., 80]` -> `[..., 80]` int32.

    The two are equal for every float32 number.
    """
    return jnp.sum(log_mel.astype(jnp.float32)[..., None] >= _EDGES, axis=-1, dtype=jnp.int32)


def to_16_bits(wave: np.ndarray) -> np.ndarray:
    """Returns `[N]` float32 samples rounded to the steps of a 16-bit recording, 1 / 32768. Nothing is clipped.

    Most sound has been rounded before: samples from a 16-bit file or connection come back unchanged. Resampled sound,
    decoded G.711 and float samples have not. Their spectrum has places far below the noise of the rounding, for example
    above 4 kHz in a resampled telephone call. A model that was trained on rounded sound has never heard such places.
    """
    return np.rint(np.asarray(wave, np.float32) * np.float32(32768)) / np.float32(32768)


def user_dmel(wave: np.ndarray) -> np.ndarray:
    """Returns the dMel bins `[ceil(N / 800), 80]` uint8 that the model hears of `[N]` float32 samples of the user.

    Raises:
      ValueError: the wave has more than one axis.
    """
    return quantise(log_mel(to_16_bits(_one_channel(wave))))


def dequantise(bins: np.ndarray) -> np.ndarray:
    """Returns the log-mels `[..., 80]` float32 at the centres of dMel bins `[..., 80]`."""
    return _CENTRES[np.asarray(bins)]


SILENT_BINS = quantise(log_mel(np.zeros(DMEL_HOP, np.float32)))[0]
"""`[80]` uint8: the dMel frame of digital silence. All its bins are 2, because the released recipe clamps the power."""

SILENT_FINE = fine_log_mel(np.zeros(FINE_HOP, np.float32))[0]
"""`[80]` float32: the fine frame of digital silence."""

SILENT_MELS = np.concatenate([log_mel(np.zeros(DMEL_HOP, np.float32))[0], np.tile(SILENT_FINE, FINE_PER_FRAME)])
"""`[400]` float32: the coarse and the fine frames of 50 ms of digital silence."""


@dataclass(frozen=True)
class DmelStream:
    """Turns audio into dMel one micro-turn at a time. The bins equal `user_dmel` of the whole wave, bit for bit.

    Start with `DmelStream()`, then call `stream, bins = stream.step(samples)` for each micro-turn.

    Attributes:
      tail: `[800]` float32, the samples that the next window still needs, rounded to 16 bits.
    """

    tail: np.ndarray = field(default_factory=lambda: np.zeros(_LEFT_PAD, np.float32))

    def step(self, samples: np.ndarray) -> tuple[DmelStream, np.ndarray]:
        """Returns the stream after `[3200]` float32 samples, and their bins `[4, 80]` uint8.

        Raises:
          ValueError: these are not the samples of one micro-turn.
        """
        samples = _one_channel(samples)
        if len(samples) != MICRO_TURN_SAMPLES:
            raise ValueError(f"a micro-turn has {MICRO_TURN_SAMPLES} samples, got {len(samples)}")
        padded = np.concatenate([self.tail, to_16_bits(samples)])
        return DmelStream(padded[-_LEFT_PAD:].copy()), quantise(_log_mel_frames(padded, DMEL_WINDOW, DMEL_HOP))
