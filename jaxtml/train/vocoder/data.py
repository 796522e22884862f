"""Training material for the vocoder: recordings with their frames and pitch, and batches addressed by step.

`make_batch(voice, seed, step, ...)` depends on its arguments alone, so a run resumes from one integer. Called by
`jaxtml.train.vocoder.training`.

Axes: B rows, N samples, F fine frames (12.5 ms, 200 samples each) of all recordings or of a segment, 80 mel channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import soxr

from jaxtml.data.bank import Bank
from jaxtml.errors import InputError
from jaxtml.stream.dmel import fine_log_mel
from jaxtml.stream.timebase import FINE_HOP, LOG_MEL_MAX, LOG_MEL_MIN, N_MELS, SAMPLE_RATE
from jaxtml.train.vocoder.pitch import LOW_HZ, track_pitch

_SILENCE = SAMPLE_RATE // 2  # samples before and after each recording, so that onsets from silence are learnt
_SPEEDS = (0.88, 1.13)  # the assistant's utterances are learnt at these speeds too
_GAIN_DB = (-18.0, 6.0)
# Share of rows whose frames are disturbed. In service frames come from the flow head, not from a recording.
_DISTURBED = 0.5
_NEURAL_VOICES = ("kokoro:", "piper:")


class VoiceRecordings(NamedTuple):
    """Recordings end to end, on the frame grid.

    Attributes:
      wave: `[200 F]` float32.
      frames: `[F, 80]` float32, fine log-mels.
      octaves: `[F]` float32, pitch as log2(Hz / 60).
      voiced: `[F]` bool.
    """

    wave: np.ndarray
    frames: np.ndarray
    octaves: np.ndarray
    voiced: np.ndarray


class VocoderBatch(NamedTuple):
    """Segments to learn from.

    Attributes:
      frames: `[B, F, 80]` float32, fine log-mels, some of them disturbed.
      wave: `[B, 200 F]` float32, the target.
      octaves: `[B, F]` float32, pitch as log2(Hz / 60).
      voiced: `[B, F]` float32, 0 or 1.
      start: `[B]` uint32, the number of the segment's first frame, drawn at random. The vocoder computes its noise from
        frame numbers, so every row has its own noise.
    """

    frames: jax.Array
    wave: jax.Array
    octaves: jax.Array
    voiced: jax.Array
    start: jax.Array


def read_recordings(banks: Sequence[Path | str]) -> list[np.ndarray]:
    """Reads the recordings that the vocoder learns from (`jaxtml.data.bank`).

    Every utterance of the assistant is learnt at its own speed, slower and faster, with its pitch changed accordingly.
    Utterances of users with neural voices are added from the training split, up to a quarter of the whole. A vocoder
    that has learnt several voices reads imperfect frames of the assistant's voice better.

    Returns:
      Recordings `[N]` float32 at 16 kHz.

    Raises:
      InputError: no bank there, or no utterance of the assistant in the banks.
    """
    opened = [Bank.open(folder) for folder in banks]
    own = [bank.utterance(int(index)).wave for bank in opened for index in bank.select(role="assistant")]
    if not own:
        raise InputError("the vocoder has nothing to train on: the banks hold no utterance of the assistant's voice")
    waves = [*own, *(soxr.resample(wave, SAMPLE_RATE * speed, SAMPLE_RATE) for wave in own for speed in _SPEEDS)]
    # Samples that users may add: 1/3 of the assistant's samples makes the users' share 1/4 of all samples.
    room = sum(map(len, waves)) // 3
    for bank in opened:
        for index in bank.select(split="train", role="user"):
            if bank.entries[index].planned.voice.startswith(_NEURAL_VOICES) and room > 0:
                waves.append(bank.utterance(int(index)).wave)
                room -= len(waves[-1])
    return waves


def join_recordings(waves: Sequence[np.ndarray]) -> VoiceRecordings:
    """Joins recordings (`[N]` float32 at 16 kHz) with silence between them, and computes their frames and pitch."""
    pieces = [np.zeros(_SILENCE, np.float32)]
    for wave in waves:
        pieces += [wave.astype(np.float32), np.zeros(_SILENCE + -len(wave) % FINE_HOP, np.float32)]
    wave = np.concatenate(pieces)
    hz, voiced = track_pitch(wave)
    octaves = np.log2(np.maximum(hz, LOW_HZ) / LOW_HZ).astype(np.float32)
    return VoiceRecordings(wave, fine_log_mel(wave), octaves, voiced)


def make_batch(voice: VoiceRecordings, seed: int, step: int, rows: int, length: int) -> VocoderBatch:
    """Returns batch number `step`: `rows` segments of `length` frames, at random places, gains and disturbances."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(voice.frames) - length, rows)
    index = starts[:, None] + np.arange(length)
    wave = voice.wave.reshape(-1, FINE_HOP)[index].reshape(rows, -1)
    loudest = np.abs(wave).max(axis=1, keepdims=True)
    gain = np.minimum(10.0 ** (rng.uniform(*_GAIN_DB, (rows, 1)) / 20), 0.98 / np.maximum(loudest, 1e-3))
    frames = voice.frames[index] + np.log10(gain)[..., None]
    disturbed = disturb(frames, rng)
    frames = np.where(rng.random((rows, 1, 1)) < _DISTURBED, disturbed, frames)
    return VocoderBatch(
        frames=jnp.asarray(np.clip(frames, LOG_MEL_MIN, LOG_MEL_MAX), jnp.float32),
        wave=jnp.asarray(wave * gain, jnp.float32),
        octaves=jnp.asarray(voice.octaves[index]),
        voiced=jnp.asarray(voice.voiced[index], jnp.float32),
        start=jnp.asarray(rng.integers(0, 2**31, rows, dtype=np.uint32)),
    )


def disturb(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns frames `[B, F, 80]` as an imperfect generator gives them: blurred over mel and time, and noisy."""
    rows = len(frames)
    over_mel = 0.5 * (np.roll(frames, 1, axis=2) + np.roll(frames, -1, axis=2))
    over_mel[..., [0, N_MELS - 1]] = frames[..., [0, N_MELS - 1]]
    frames = frames + rng.uniform(0, 0.5, (rows, 1, 1)) * (over_mel - frames)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = frames + rng.uniform(0, 0.4, (rows, 1, 1)) * (before - frames)
    return frames + rng.uniform(0, 0.15, (rows, 1, 1)) * rng.standard_normal(frames.shape)
