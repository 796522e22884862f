"""Sound as protocols carry it: PCM of 16 bits and G.711, at their rates, to and from the model's 16 kHz.

Both directions are streams: a resampler keeps its state from chunk to chunk, so there is no click between two. It is
FFmpeg's, whose filter is a millisecond or two long; soxr's is better yet and gives its output 20 to 115 ms later. One
object per session and direction. Called by the protocols.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av
import av.filter
import numpy as np
import soundfile

from jaxtml.stream.timebase import MICRO_TURN_MS, SAMPLE_RATE

_SPARE = 32  # samples by which a resampler's chunks may differ in length
_G711 = {"pcmu": "ULAW", "pcma": "ALAW"}


@dataclass(frozen=True)
class SoundFormat:
    """`kind` is "pcm" (signed, 16 bits, little-endian), "pcmu" or "pcma" (G.711, 8 bits); mono, `rate` in Hz."""

    kind: str
    rate: int

    @property
    def width(self) -> int:
        """Bytes of a sample."""
        return 2 if self.kind == "pcm" else 1

    def decode(self, data: bytes) -> np.ndarray:
        """`[N]` float32 of what `data` holds. Raises `ValueError` where that is not whole samples."""
        if len(data) % self.width:
            raise ValueError(f"{len(data)} bytes are no samples of {8 * self.width} bits")
        if self.kind == "pcm":
            return np.frombuffer(data, "<i2").astype(np.float32) / 2**15
        if not data:
            return np.zeros(0, np.float32)
        how = {"format": "RAW", "subtype": _G711[self.kind], "channels": 1, "samplerate": self.rate}
        return soundfile.read(io.BytesIO(data), dtype="float32", **how)[0]

    def encode(self, samples: np.ndarray) -> bytes:
        """`samples` `[N]` float32; what is louder than full scale is cut off."""
        if self.kind == "pcm":
            return np.clip(np.round(samples * 2**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()
        file = io.BytesIO()
        soundfile.write(file, samples, self.rate, subtype=_G711[self.kind], format="RAW")
        return file.getvalue()


class SoundDecoder:
    """What a client sends, as the model hears it."""

    def __init__(self, format: SoundFormat):
        self.format = format
        self.stream = _Resampler(format.rate, SAMPLE_RATE)

    def decode(self, data: bytes) -> np.ndarray:
        """`[N]` float32 at 16 kHz. Raises `ValueError` as `SoundFormat.decoded`."""
        return self.resample(self.format.decode(data))

    def resample(self, samples: np.ndarray) -> np.ndarray:
        """`[N]` float32 at 16 kHz, of samples at the format's rate."""
        return self.stream.put(samples)


class SoundEncoder:
    """What the model says, as a client gets it: for each micro-turn just as many samples as it lasts.

    A resampler gives what it was given a little later; the first micro-turn begins with as much silence (`delay_ms`).
    """

    def __init__(self, format: SoundFormat):
        self.format = format
        self.samples = format.rate * MICRO_TURN_MS // 1000
        self.stream = _Resampler(SAMPLE_RATE, format.rate)
        self.waiting = np.zeros(0, np.float32)
        self.delay_ms = 0.0

    def encode(self, wave: np.ndarray) -> bytes:
        """`wave` `[3200]` float32 at 16 kHz."""
        ready = self.stream.put(wave)
        if not self.delay_ms and len(ready) < self.samples:
            short = self.samples - len(ready) + _SPARE
            self.waiting = np.zeros(short, np.float32)
            self.delay_ms = 1000 * short / self.format.rate
        self.waiting = np.concatenate([self.waiting, ready])
        given, self.waiting = self.waiting[: self.samples], self.waiting[self.samples :]
        return self.format.encode(given)


class VoiceTrack(Protocol):
    """Where a protocol puts what is said when its client does not have it as events."""

    def put(self, wave: np.ndarray) -> None:
        """`[3200]` float32 at 16 kHz: a micro-turn's."""
        ...

    def clear(self) -> None:
        """What was put and is not sent yet never is."""
        ...


class MediaSink(Protocol):
    """Takes the sound and the pictures that a WebRTC client sends on its tracks."""

    async def receive_track(self, samples: np.ndarray) -> None:
        """Takes sound, `[N]` float32 at 16 kHz. Returns when the session has room for it."""
        ...

    async def show_frame(self, frame: av.VideoFrame) -> None:
        """Shows one frame to the model. Raises `ValueError` on a shape that cannot be cut into patches."""
        ...


class _Resampler:
    """`[N]` float32 at one rate, piece by piece, at another."""

    def __init__(self, before: int, after: int):
        self.rate, self.graph = before, None if before == after else av.filter.Graph()
        if self.graph is not None:
            self.graph.threads = 1  # `av.AudioResampler` has two threads of its own for each session and direction
            source = self.graph.add_abuffer(
                sample_rate=before, format="flt", layout="mono", time_base=Fraction(1, before)
            )
            wanted = self.graph.add("aformat", f"sample_fmts=flt:sample_rates={after}:channel_layouts=mono")
            sink = self.graph.add("abuffersink")
            source.link_to(wanted)
            wanted.link_to(sink)
            self.graph.configure()

    def put(self, samples: np.ndarray) -> np.ndarray:
        if self.graph is None or not len(samples):
            return samples
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="flt", layout="mono")
        frame.sample_rate = self.rate
        self.graph.push(frame)
        found = [np.zeros(0, np.float32)]
        with contextlib.suppress(BlockingIOError):  # it wants more first
            while True:
                found.append(self.graph.pull().to_ndarray()[0])
        return np.concatenate(found)
