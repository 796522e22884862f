"""Makes other speakers of one recorded voice: another vocal tract, pitch, tempo and articulation. Pure numpy.

A bank has a few hundred voices, and a model that has heard only them does not hear other people well. So every session
draws a `VocalTract`, and all utterances of the session's user go through `reshape`. The same recording sounds like
another person in each session that uses it.

- The spectral envelope, which holds the formants, is stretched over frequency (vocal tract length) and bent (the
  shape of the tract), and its peaks are made sharper or flatter (clear or slack articulation). The fine structure,
  which holds the pitch, stays.
- Resampling moves pitch, formants and tempo together. The stretch of the envelope then takes back what resampling did
  to the formants.
- Overlapping pieces are moved closer together or further apart (WSOLA, Verhelst and Roelands 1993). This changes the
  tempo and nothing else.

Called by `jaxtml.data.talks.user_turns`.

Axis glossary: N samples, F frames of 32 ms, K FFT bins, C cepstral coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from jaxtml.data.talks import edits
from jaxtml.data.talks.edits import Clip
from jaxtml.stream.timebase import SAMPLE_RATE

_FRAME, _HOP = 512, 128  # samples: 32 ms, 8 ms
_COEFFICIENTS = (
    30  # of the cepstrum: 2 ms, shorter than the period of any voice, so that no harmonic is in the envelope
)
_MAX_GAIN = 2.3  # 20 dB as a natural logarithm of amplitude
_PIECE, _SEARCH = 480, 160  # samples: WSOLA joins pieces of 30 ms, each moved by up to 10 ms to fit the one before it


@dataclass(frozen=True)
class VocalTract:
    """How a speaker differs from the recorded one.

    Attributes:
      formants: factor on the frequencies of the formants, the inverse of the factor on the vocal tract's length.
      bend: further factors on the formants around 400, 1,500 and 4,000 Hz.
      sharpness: exponent of the spectral envelope. Above 1, formants stand out more.
      pitch: factor on the fundamental frequency.
      tempo: factor on the speed of speech.
    """

    formants: float = 1.0
    bend: tuple[float, float, float] = (1.0, 1.0, 1.0)
    sharpness: float = 1.0
    pitch: float = 1.0
    tempo: float = 1.0


def draw_vocal_tract(rng: np.random.Generator) -> VocalTract:
    """Draws a speaker.

    Vocal tracts of adults are 13 to 20 cm long (Story et al., 2018), and normalisation for speech recognition searches
    factors from 0.88 to 1.12 around the mean voice (Lee and Rose, 1998). The voices of a bank differ already, so these
    bounds reach children and large men. The pitch of one sex varies by a factor of 1.5 (Hillenbrand et al., 1995). The
    tempo of conversation varies by a factor of 2 (Jacewicz et al., 2009).
    """
    log_bend = rng.normal(0.0, 0.035, 3).clip(-0.08, 0.08)
    return VocalTract(
        formants=float(np.exp(np.clip(rng.normal(0.0, 0.07), -0.17, 0.2))),
        bend=(float(np.exp(log_bend[0])), float(np.exp(log_bend[1])), float(np.exp(log_bend[2]))),
        sharpness=float(rng.uniform(0.75, 1.2)),
        pitch=float(np.exp(np.clip(rng.normal(0.0, 0.12), -0.25, 0.25))),
        tempo=float(np.exp(rng.uniform(np.log(0.75), np.log(1.3)))),
    )


def reshape(clip: Clip, tract: VocalTract) -> Clip:
    """Returns the clip as the other speaker would say it. The times of the words follow.

    The level changes by a few dB.
    """
    clip = edits.change_rate(clip, tract.pitch)
    warped = replace(tract, formants=tract.formants / tract.pitch)
    if (warped.formants, warped.bend, warped.sharpness) != (1.0, (1.0, 1.0, 1.0), 1.0):
        clip = replace(clip, wave=_warp_envelope(clip.wave, warped))
    return _change_tempo(clip, tract.tempo / tract.pitch)


def _warp_envelope(wave: np.ndarray, tract: VocalTract) -> np.ndarray:
    """Returns `[N]` with the spectral envelope of each frame stretched, bent and sharpened."""
    n = len(wave)
    padded = np.pad(wave, (_FRAME, 2 * _FRAME))
    window = _window()
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP] * window
    spectrum = np.fft.rfft(frames, axis=1)
    magnitude = np.abs(spectrum)
    n_frames = len(frames)
    log_magnitude = np.log(magnitude + np.float32(1e-3) * magnitude.max() + np.float32(1e-9))
    analysis, synthesis = _cepstrum()
    freqs_hz = np.arange(_FRAME // 2 + 1) * (SAMPLE_RATE / _FRAME)
    factor = tract.formants * np.exp(
        np.interp(np.log(np.maximum(freqs_hz, 50.0)), np.log((400.0, 1500.0, 4000.0)), np.log(tract.bend))
    )
    source = np.clip(freqs_hz / factor / (SAMPLE_RATE / 2), 0.0, 1.0)
    order = np.arange(_COEFFICIENTS)
    warped = np.cos(np.pi * order[:, None] * source)
    warped[1:] *= 2 * tract.sharpness  # coefficient 0 is the loudness of the frame
    # One product of all frames would be split among the threads of BLAS, and rounded by their number. Rows must not
    # depend on the machine and its load, so the products are small ones of four frames.
    fours = np.pad(log_magnitude, ((0, -n_frames % 4), (0, 0))).reshape(-1, 4, log_magnitude.shape[1])
    change = np.matmul(np.matmul(fours, analysis), (warped - synthesis).astype(np.float32))
    change = change.reshape(-1, log_magnitude.shape[1])[:n_frames]
    spectrum *= np.exp(np.clip(change, -_MAX_GAIN, _MAX_GAIN))
    pieces = np.fft.irfft(spectrum, _FRAME, axis=1).astype(np.float32) * window
    return _overlap_add(pieces, _HOP)[_FRAME : _FRAME + n] * np.float32(1 / 1.5)  # squared Hann windows add up to 1.5


@cache
def _window() -> np.ndarray:
    """Returns the periodic Hann window `[512]`."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FRAME) / _FRAME)).astype(np.float32)


@cache
def _cepstrum() -> tuple[np.ndarray, np.ndarray]:
    """Returns the matrices from log magnitudes to a smooth cepstrum, `[K, C]`, and back, `[C, K]`."""
    bins = np.arange(_FRAME // 2 + 1)
    cosines = np.cos(2 * np.pi * np.outer(np.arange(_COEFFICIENTS), bins) / _FRAME)
    weights = np.where((bins == 0) | (bins == _FRAME // 2), 1.0, 2.0) / _FRAME
    synthesis = cosines.copy()
    synthesis[1:] *= 2
    return (cosines * weights).T.astype(np.float32), synthesis.astype(np.float32)


def _overlap_add(pieces: np.ndarray, hop: int) -> np.ndarray:
    """Adds pieces `[F, L]`, each `hop` samples after the one before. L is a multiple of `hop`."""
    count, length = pieces.shape
    parts = length // hop
    out = np.zeros((count + parts - 1, hop), np.float32)
    for part in range(parts):
        out[part : part + count] += pieces[:, part * hop : (part + 1) * hop]
    return out.reshape(-1)


def _change_tempo(clip: Clip, tempo: float) -> Clip:
    """Plays the clip `tempo` times as fast, at the same pitch."""
    n = len(clip.wave)
    half = _PIECE // 2
    count = max(round(n / tempo / half), 1)
    if abs(tempo - 1) < 0.02 or n < 4 * _PIECE:
        return clip
    padded = np.pad(clip.wave, (_PIECE, 2 * _PIECE + _SEARCH))
    coarse = padded[::2]  # every other sample shows as well where two pieces are alike
    energy = np.concatenate([[0.0], np.cumsum(np.square(coarse, dtype=np.float64))])
    norm = np.sqrt(np.maximum(energy[half:] - energy[:-half], 1e-9)).astype(np.float32)
    starts = np.empty(count + 1, np.int64)
    starts[0] = _PIECE - half
    for k in range(1, count + 1):
        wanted = (starts[k - 1] + half) // 2  # the piece that would follow without a change of tempo
        low = max(min(round(k * half * tempo), n) + _PIECE - half - _SEARCH, 0) // 2
        likeness = np.correlate(coarse[low : low + _SEARCH + half], coarse[wanted : wanted + half], "valid")
        starts[k] = min(2 * (low + int(np.argmax(likeness / norm[low : low + _SEARCH + 1]))), n + _PIECE)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _PIECE)
    ramp = (0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(_PIECE) + 0.5) / _PIECE)).astype(np.float32)
    wave = _overlap_add(windows[starts] * ramp, half)[half : half + round(n / tempo)]
    scale, length_s = n / len(wave), len(wave) / SAMPLE_RATE
    words = tuple(
        replace(word, start_s=min(word.start_s / scale, length_s), end_s=min(word.end_s / scale, length_s))
        for word in clip.words
    )
    return Clip(wave, words)
