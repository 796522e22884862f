"""Sound as protocols carry it: PCM of 16 bits and G.711, at their rates, to and from the model's 16 kHz.

Both directions are streams: a resampler keeps its state from chunk to chunk, so there is no click between two. One
object per session and direction. Called by the protocols.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from jaxtml.stream.timebase import SAMPLE_RATE, TURN_MS

_SPARE = 32  # samples by which a resampler's chunks may differ in length
_QUALITY = "HQ"
_G711 = {"pcmu": "ULAW", "pcma": "ALAW"}


@dataclass(frozen=True)
class Format:
    """`kind` is "pcm" (signed, 16 bits, little-endian), "pcmu" or "pcma" (G.711, 8 bits); mono, `rate` in Hz."""

    kind: str
    rate: int

    @property
    def width(self) -> int:
        """Bytes of a sample."""
        return 2 if self.kind == "pcm" else 1

    def decoded(self, data: bytes) -> np.ndarray:
        """`[N]` float32 of what `data` holds. Raises `ValueError` where that is not whole samples."""
        if len(data) % self.width:
            raise ValueError(f"{len(data)} bytes are no samples of {8 * self.width} bits")
        if self.kind == "pcm":
            return np.frombuffer(data, "<i2").astype(np.float32) / 2**15
        if not data:
            return np.zeros(0, np.float32)
        how = {"format": "RAW", "subtype": _G711[self.kind], "channels": 1, "samplerate": self.rate}
        return soundfile.read(io.BytesIO(data), dtype="float32", **how)[0]

    def encoded(self, samples: np.ndarray) -> bytes:
        """`samples` `[N]` float32; what is louder than full scale is cut off."""
        if self.kind == "pcm":
            return np.clip(np.round(samples * 2**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()
        file = io.BytesIO()
        soundfile.write(file, samples, self.rate, subtype=_G711[self.kind], format="RAW")
        return file.getvalue()


class Incoming:
    """What a client sends, as the model hears it."""

    def __init__(self, format: Format):
        self.format = format
        self.stream = _stream(format.rate, SAMPLE_RATE)

    def put(self, data: bytes) -> np.ndarray:
        """`[N]` float32 at 16 kHz. Raises `ValueError` as `Format.decoded`."""
        samples = self.format.decoded(data)
        return samples if self.stream is None else self.stream.resample_chunk(samples)


class Outgoing:
    """What the model says, as a client gets it: for each micro-turn just as many samples as it lasts.

    A resampler gives what it was given a little later (`delay_ms`, some milliseconds); the first micro-turn begins
    with as much silence.
    """

    def __init__(self, format: Format):
        self.format = format
        self.samples = format.rate * TURN_MS // 1000
        self.stream = _stream(SAMPLE_RATE, format.rate)
        self.waiting = np.zeros(0, np.float32)
        self.delay_ms = 0.0

    def put(self, wave: np.ndarray) -> bytes:
        """`wave` `[3200]` float32 at 16 kHz."""
        if self.stream is None:
            return self.format.encoded(wave)
        ready = self.stream.resample_chunk(wave)
        if not self.delay_ms:
            short = self.samples - len(ready) + _SPARE
            self.waiting = np.zeros(short, np.float32)
            self.delay_ms = 1000 * short / self.format.rate
        self.waiting = np.concatenate([self.waiting, ready])
        given, self.waiting = self.waiting[: self.samples], self.waiting[self.samples :]
        return self.format.encoded(given)


def _stream(before: int, after: int) -> soxr.ResampleStream | None:
    return None if before == after else soxr.ResampleStream(before, after, 1, dtype="float32", quality=_QUALITY)
