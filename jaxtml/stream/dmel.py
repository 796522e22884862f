"""The audio front end: log-mel frames and the 16-bin dMel that the model hears, whole-wave and in micro-turns.

The recipe is the one released with Inkling (`InklingFeatureExtractor` and `InklingProcessor` of transformers 5.23);
the tests hold the bins equal to it. `jaxtml.data` quantises training audio with it, the server and `converse` feed it
one micro-turn at a time, and the flow head trains on `fine_log_mel`. numpy on the host; `quantise_jax` is the same
quantiser inside a compiled step.

Axes: N samples at 16 kHz, F frames (coarse: one per 800 samples; fine: one per 200), K FFT bins, M = 80 mel channels.
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
    FINE_WINDOW,
    FRAMES_PER_MICRO_TURN,
    LOG_MEL_MAX,
    LOG_MEL_MIN,
    MICRO_TURN_SAMPLES,
    N_BINS,
    N_MELS,
    SAMPLE_RATE,
)

_FLOOR = 1e-10  # of the power before its square root, and of the mel magnitude before its logarithm
_BLOCK = 64 * FRAMES_PER_MICRO_TURN  # frames transformed at a time: bounds memory on hours of audio and stays in cache
_CENTRES = np.linspace(LOG_MEL_MIN, LOG_MEL_MAX, N_BINS).astype(np.float32)
_LEFT_PAD = DMEL_WINDOW - DMEL_HOP


def _bin_edges() -> np.ndarray:
    """`[15]` float32: the smallest number that falls into each of the bins 1..15.

    The released quantiser takes the first `argmin |x - centre|` in float32. Rounding keeps that rule monotone in x, so
    it equals a comparison with fixed edges; finding them once near the midpoints makes it exact, and the same, in
    numpy and in XLA.
    """
    steps = np.arange(-64, 65)
    middles = ((_CENTRES[1:] + _CENTRES[:-1]) / 2).astype(np.float32)
    one_up = np.spacing(np.abs(middles))
    candidates = (middles[:, None] + steps * one_up[:, None]).astype(np.float32)  # [15, 129], rising
    below = np.abs(candidates - _CENTRES[:-1, None]) <= np.abs(candidates - _CENTRES[1:, None])
    return candidates[np.arange(N_BINS - 1), below.sum(axis=1)]


_EDGES = _bin_edges()


@lru_cache
def mel_filterbank(n_fft: int) -> np.ndarray:
    """Triangular filters `[n_fft // 2 + 1, 80]` float64, 0-8000 Hz, Slaney's mel scale and area normalisation.

    Slaney, Auditory Toolbox (1998): linear to 1 kHz (200 / 3 Hz a mel), then logarithmic with 27 mels a factor of 6.4.
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
    filters.setflags(write=False)  # one array is shared by every caller
    return filters


@lru_cache
def _hann(length: int) -> np.ndarray:
    """Periodic Hann window, rounded to float32 as released."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def _log_mel_frames(padded: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """Log10 mel magnitudes `[F, 80]` float32 in [-7, 2] of every window of `n_fft` samples, `hop` apart.

    In float64, so that a bin differs from the exact one only where the released float32 arithmetic errs. The filters
    are applied to four frames at a time: a matrix product rounds by its shape, and a stream sees four.
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


def _checked(wave: np.ndarray) -> np.ndarray:
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1:
        raise ValueError(f"audio is one-dimensional, [N] samples; got shape {wave.shape}")
    return wave


def log_mel(wave: np.ndarray) -> np.ndarray:
    """`[N]` 16 kHz float32 -> `[ceil(N / 800), 80]` float32 in [-7, 2]; frame f ends with sample 800 (f + 1).

    100 ms windows every 50 ms, causal: zeros before the first sample, and after the last to a whole hop.
    """
    wave = _checked(wave)
    if len(wave) == 0:
        return np.empty((0, N_MELS), np.float32)
    return _log_mel_frames(np.pad(wave, (_LEFT_PAD, -len(wave) % DMEL_HOP)), DMEL_WINDOW, DMEL_HOP)


def fine_log_mel(wave: np.ndarray) -> np.ndarray:
    """`[N]` 16 kHz float32, N a multiple of 200 -> `[N / 200, 80]` float32 in [-7, 2]: what the vocoder speaks from.

    Frame i is centred on samples [200 i, 200 i + 200): a 50 ms window over [200 i - 300, 200 i + 500), zeros outside
    the wave. It looks 300 samples past its hop; as a target of generation that costs no latency.
    """
    wave = _checked(wave)
    if len(wave) % FINE_HOP:
        raise ValueError(f"fine_log_mel needs a multiple of {FINE_HOP} samples, got {len(wave)}")
    if len(wave) == 0:
        return np.empty((0, N_MELS), np.float32)
    side = (FINE_WINDOW - FINE_HOP) // 2
    return _log_mel_frames(np.pad(wave, (side, side)), FINE_WINDOW, FINE_HOP)


def quantise(log_mel: np.ndarray) -> np.ndarray:
    """Log-mels `[..., 80]` -> dMel bins `[..., 80]` uint8, 0..15: the nearest of 16 centres from -7 to 2, ties down."""
    values = np.asarray(log_mel, np.float32)
    return (values[..., None] >= _EDGES).sum(axis=-1, dtype=np.uint8)


def quantise_jax(log_mel: jax.Array) -> jax.Array:
    """`quantise` inside a compiled program, equal for every float32 input: `[..., 80]` -> `[..., 80]` int32."""
    return jnp.sum(log_mel.astype(jnp.float32)[..., None] >= _EDGES, axis=-1, dtype=jnp.int32)


def dequantise(bins: np.ndarray) -> np.ndarray:
    """dMel bins `[..., 80]` -> the log-mels at the bins' centres, float32."""
    return _CENTRES[np.asarray(bins)]


SILENT_BINS = quantise(log_mel(np.zeros(DMEL_HOP, np.float32)))[0]
"""`[80]` uint8: the dMel frame of digital silence (bin 2, from the released clamp on power)."""

SILENT_FINE = fine_log_mel(np.zeros(FINE_HOP, np.float32))[0]
"""`[80]` float32: the fine frame of digital silence."""


@dataclass(frozen=True)
class DmelStream:
    """The front end one micro-turn at a time: `stream, bins = stream.step(samples)`, starting from `DmelStream()`.

    The bins are those of the whole wave, bit for bit. The state is the 800 samples that the next window still needs.
    """

    tail: np.ndarray = field(default_factory=lambda: np.zeros(_LEFT_PAD, np.float32))

    def step(self, samples: np.ndarray) -> tuple[DmelStream, np.ndarray]:
        """`[3200]` float32 -> (the stream after it, `[4, 80]` uint8)."""
        samples = _checked(samples)
        if len(samples) != MICRO_TURN_SAMPLES:
            raise ValueError(f"a micro-turn has {MICRO_TURN_SAMPLES} samples, got {len(samples)}")
        padded = np.concatenate([self.tail, samples])
        return DmelStream(padded[-_LEFT_PAD:].copy()), quantise(_log_mel_frames(padded, DMEL_WINDOW, DMEL_HOP))
