"""Sounds that nobody should answer: coughs and knocks of the user, and the talk of other people in the room.

Called by `jaxtml.data.talks.timing` (coughs) and `jaxtml.data.talks.mix` (babble).

Axis glossary: N samples of the session, M samples of one cough.
"""

from __future__ import annotations

import numpy as np

from jaxtml.data.talks import edits
from jaxtml.data.talks.edits import Clip
from jaxtml.data.talks.speakers import Speakers
from jaxtml.stream.timebase import SAMPLE_RATE


def cough(rng: np.random.Generator) -> np.ndarray:
    """Draws a cough, a knock or a rustle as one to three short bursts of coloured noise.

    Returns `[M]` float32 at unit level: its loud parts have a root mean square of about 1.
    """
    pieces = []
    for _ in range(int(rng.integers(1, 4))):
        n = int(rng.integers(480, 4800))
        spectrum = np.fft.rfft(rng.standard_normal(n, dtype=np.float32))
        freqs = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
        centre_hz, width = rng.uniform(200, 3000), rng.uniform(0.4, 1.5)
        spectrum *= np.exp(-0.5 * (np.log(np.maximum(freqs, 20.0) / centre_hz) / width) ** 2)
        t = np.arange(n) / n
        burst = (
            np.fft.irfft(spectrum, n) * np.minimum(t / rng.uniform(0.01, 0.15), 1.0) * np.exp(-t * rng.uniform(2, 8))
        )
        pieces.append(edits.set_level(Clip(edits.fade_ends(burst), ()), 10 ** (rng.uniform(-12, 3) / 20)).wave)
        pieces.append(np.zeros(int(rng.integers(0, 3200)), np.float32))
    return np.concatenate(pieces)


def babble(rng: np.random.Generator, speakers: Speakers, n: int, talkers: int = 4) -> np.ndarray:
    """Draws several voices of the bank that talk at the same time, with short gaps.

    Returns `[N]` float32 with a root mean square of about 1.

    Args:
      rng: everything random comes from this generator.
      speakers: the voices.
      n: samples.
      talkers: voices at a time.
    """
    mixed = np.zeros(n, np.float32)
    for _ in range(talkers):
        at = -int(rng.integers(SAMPLE_RATE))
        while at < n:
            index = int(speakers.users[int(rng.integers(len(speakers.users)))])
            wave = edits.set_level(speakers.clip(index), 1.0).wave
            low, high = max(at, 0), min(at + len(wave), n)
            if high > low:
                mixed[low:high] += wave[low - at : high - at]
            at += len(wave) + int(rng.integers(SAMPLE_RATE // 4))
    return mixed / np.float32(np.sqrt(talkers))
