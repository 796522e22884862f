"""Notices what makes a recording hard to hear: silence, a low level, clipping, a constant offset, cancelling channels.

Called by `jaxtml.stream.audio_file`. Nothing is changed here. Levels are root mean squares in dB of full scale (dBFS).

Axes: n samples of a block, C channels, N samples at 16 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

QUIET_DBFS = -50.0
"""Recordings whose loudest 200 ms are below this level are called very quiet. Training data begins at -45 dBFS."""

_FULL = 32766 / 32768  # samples from here on are at full scale
_CLIPPED = 0.001  # clipping is mentioned if a larger share of the samples is clipped
_OFFSET = 0.02  # of full scale; microphones have a hundredth of this
_CANCELS = 0.1  # the power of the sum of the channels over the sum of their powers; 1 for unrelated channels
_SILENT = 0.001  # of the power of the loudest channel; crosstalk between the speakers of a call is louder
_AUDIBLE = 1e-9  # power (-90 dBFS) below which channels are not compared


@dataclass
class Channels:
    """Compares the channels of a recording, block by block.

    Attributes:
      compared_s: seconds with sound.
      cancelled_s: seconds with sound whose channels cancel each other when they are added.
      power: `[C]`, the power of each channel, summed over the seconds in which the channels cancel each other.
      silent_s: `[C]`, seconds in which this channel is silent, other channels have sound, and nothing cancels.
      clipped, samples: the number of samples that are clipped, and of all samples.
    """

    compared_s: float = 0.0
    cancelled_s: float = 0.0
    power: np.ndarray = field(default_factory=lambda: np.zeros(1))
    silent_s: np.ndarray = field(default_factory=lambda: np.zeros(1))
    clipped: int = 0
    samples: int = 0

    def add(self, rate: int, block: np.ndarray) -> None:
        """Takes in a block `[n, C]`."""
        full = np.abs(block) >= _FULL
        self.clipped += int((full[:-2] & full[1:-1] & full[2:]).sum())
        self.samples += block.size
        if block.shape[1] < 2:
            return
        for piece in np.array_split(block, max(1, 2 * len(block) // rate)):
            powers = piece.var(axis=0)
            if powers.sum() < _AUDIBLE:
                continue
            seconds = len(piece) / rate
            self.compared_s += seconds
            if piece.sum(axis=1).var() < _CANCELS * powers.sum():
                self.cancelled_s += seconds
                self.power = _sum(self.power, seconds * powers)
            else:
                self.silent_s = _sum(self.silent_s, seconds * (powers < _SILENT * powers.max()))

    @property
    def best(self) -> int | None:
        """The channel to hear alone, because the average of all channels loses sound; None: the average is heard.

        The average is heard where it is good, and also where it loses less sound than that channel alone.
        """
        if self.cancelled_s <= 0.02 * self.compared_s:
            return None
        best = int(self.power.argmax())
        return None if self._loss_s(best) > self.cancelled_s else best

    def _loss_s(self, channel: int) -> float:
        """Returns the seconds of sound that `channel` alone lacks, such as those of a speaker in another channel."""
        return float(self.silent_s[channel]) if channel < len(self.silent_s) else 0.0

    def notes(self) -> list[str]:
        """Returns a sentence about each thing that was noticed."""
        notes = []
        if (best := self.best) is not None:
            notes.append(
                f"its channels cancel each other in {self.cancelled_s:.1f} s (one is inverted); "
                f"channel {best + 1} is heard alone"
            )
        elif self.cancelled_s > 0.02 * self.compared_s:
            notes.append(
                f"its channels cancel each other in {self.cancelled_s:.1f} s, which are lost; no channel alone has all "
                "of the sound: give one channel, or invert one"
            )
        if self.clipped > _CLIPPED * self.samples:
            notes.append(f"{100 * self.clipped / self.samples:.1f} % of its samples are clipped at full scale (0 dBFS)")
        return notes


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the sum of two arrays `[C]`. Joined recordings may have different numbers of channels."""
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


def level_notes(wave: np.ndarray) -> list[str]:
    """Returns a sentence about the level of a recording `[N]` float32, if there is something to say."""
    if not wave.any():
        return ["digital silence: every sample is 0 (-inf dBFS)"]
    offset = float(wave.mean(dtype=np.float64))
    whole = wave[: max(1, len(wave) // MICRO_TURN_SAMPLES) * MICRO_TURN_SAMPLES]
    pieces = np.array_split(whole, max(1, len(whole) // MICRO_TURN_SAMPLES))
    loudest = max(float(piece.std(dtype=np.float64)) for piece in pieces)
    level = f"{20 * np.log10(loudest):.0f} dBFS" if loudest > 1e-6 else "below -120 dBFS"
    if abs(offset) > _OFFSET:
        return [
            f"has a constant offset (DC) of {offset:+.2f} of full scale; without it the loudest 200 ms are at {level}"
        ]
    if loudest < 10 ** (QUIET_DBFS / 20):
        return [f"very quiet: its loudest 200 ms are at {level}; speech is usually near -25 dBFS: raise it"]
    return []
