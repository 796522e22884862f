"""Converts between the audio of protocols (16-bit PCM or G.711, at several sample rates) and the model's 16 kHz.

Called by the protocols and by `serve.sessions.intake`. Each session has one `SoundDecoder` and one `SoundEncoder`.

Both directions are streams: a resampler keeps its state between chunks, so there is no click between two chunks. The
resampler is FFmpeg's, whose filter is one or two milliseconds long. soxr sounds better, but delays its output by 20 to
115 ms.
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

_SPARE = 32  # samples by which the lengths of a resampler's chunks may differ
# The most samples in one frame for FFmpeg. To resample six minutes of sound in a single frame takes at least twice as
# long as in frames of this size.
_FRAME_SAMPLES = 2**17
_G711_SUBTYPES = {"pcmu": "ULAW", "pcma": "ALAW"}  # as soundfile names them


@dataclass(frozen=True)
class SoundFormat:
    """The format of a client's audio, mono.

    Attributes:
      kind: "pcm" (signed 16 bits, little-endian), "pcmu" or "pcma" (G.711, 8 bits).
      rate: sample rate in Hz.
    """

    kind: str
    rate: int

    @property
    def width(self) -> int:
        """Bytes of a sample."""
        return 2 if self.kind == "pcm" else 1

    def decode(self, data: bytes) -> np.ndarray:
        """Returns the samples in `data`, `[N]` float32 at the format's rate.

        Raises:
          ValueError: `data` does not hold whole samples.
        """
        if len(data) % self.width:
            raise ValueError(f"{len(data)} bytes are not a whole number of samples of {8 * self.width} bits")
        if self.kind == "pcm":
            return np.frombuffer(data, "<i2").astype(np.float32) / 2**15
        if not data:
            return np.zeros(0, np.float32)
        header = {"format": "RAW", "subtype": _G711_SUBTYPES[self.kind], "channels": 1, "samplerate": self.rate}
        return soundfile.read(io.BytesIO(data), dtype="float32", **header)[0]

    def encode(self, samples: np.ndarray) -> bytes:
        """Returns `samples`, `[N]` float32 at the format's rate, as bytes. Samples beyond full scale are clipped."""
        if self.kind == "pcm":
            return np.clip(np.round(samples * 2**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()
        file = io.BytesIO()
        soundfile.write(file, samples, self.rate, subtype=_G711_SUBTYPES[self.kind], format="RAW")
        return file.getvalue()


class SoundDecoder:
    """Turns a client's audio stream into samples for the model.

    Clients cut their stream where their buffers end, which may be inside a sample of 16 bits.

    Args:
      format: the client's format.
    """

    def __init__(self, format: SoundFormat):
        self.format = format
        self._resampler = _Resampler(format.rate, SAMPLE_RATE)
        self._half_sample = b""  # the first byte of a sample whose second byte has not come

    def decode(self, data: bytes) -> np.ndarray:
        """Returns the next samples of the stream, `[N]` float32 at 16 kHz. Half of a sample waits for its other half.

        Args:
          data: the next bytes of the stream, of any number.
        """
        data = self._half_sample + data
        whole = len(data) - len(data) % self.format.width
        self._half_sample = data[whole:]
        return self.resample(self.format.decode(data[:whole]))

    def drop_half_sample(self) -> None:
        """Forgets half of a sample: the next byte begins a sample."""
        self._half_sample = b""

    def resample(self, samples: np.ndarray) -> np.ndarray:
        """Returns the next samples of the stream, `[N]` float32 at 16 kHz, from `[M]` float32 at the format's rate."""
        return self._resampler.resample(samples)


class SoundEncoder:
    """Turns the model's audio into a client's stream: each micro-turn becomes exactly 200 ms of the client's format.

    A resampler returns its input a little later. To make up for this, the first micro-turn begins with silence.

    Args:
      format: the client's format.

    Attributes:
      delay_ms: length of the silence at the beginning.
    """

    def __init__(self, format: SoundFormat):
        self.format = format
        self.delay_ms = 0.0
        self._chunk_samples = format.rate * MICRO_TURN_MS // 1000
        self._resampler = _Resampler(SAMPLE_RATE, format.rate)
        self._pending = np.zeros(0, np.float32)  # resampled, and not returned yet

    def encode(self, wave: np.ndarray) -> bytes:
        """Returns the next 200 ms of the stream for the micro-turn `wave`, `[3200]` float32 at 16 kHz."""
        resampled = self._resampler.resample(wave)
        if not self.delay_ms and len(resampled) < self._chunk_samples:
            missing = self._chunk_samples - len(resampled) + _SPARE
            self._pending = np.zeros(missing, np.float32)
            self.delay_ms = 1000 * missing / self.format.rate
        self._pending = np.concatenate([self._pending, resampled])
        chunk, self._pending = self._pending[: self._chunk_samples], self._pending[self._chunk_samples :]
        return self.format.encode(chunk)


class VoiceTrack(Protocol):
    """Where a protocol puts the model's voice if the client gets audio on a media track instead of in events."""

    def put(self, wave: np.ndarray) -> None:
        """Adds one micro-turn, `[3200]` float32 at 16 kHz."""
        ...

    def clear(self) -> None:
        """Drops everything that was put and not sent yet."""
        ...


class MediaSink(Protocol):
    """Takes the audio and the pictures that a WebRTC client sends on its tracks."""

    async def receive_track(self, samples: np.ndarray) -> None:
        """Takes audio, `[N]` float32 at 16 kHz. Returns when the session has room for it."""
        ...

    async def show_frame(self, frame: av.VideoFrame) -> None:
        """Shows one frame to the model. Raises `ValueError` if its shape cannot be cut into patches."""
        ...


class _Resampler:
    """A streaming resampler between two rates in Hz. Does nothing if they are equal."""

    def __init__(self, input_rate: int, output_rate: int):
        self.input_rate = input_rate
        self.graph = None if input_rate == output_rate else av.filter.Graph()
        if self.graph is not None:
            self.graph.threads = 1  # `av.AudioResampler` would start two threads for each session and direction
            source = self.graph.add_abuffer(
                sample_rate=input_rate, format="flt", layout="mono", time_base=Fraction(1, input_rate)
            )
            converter = self.graph.add("aformat", f"sample_fmts=flt:sample_rates={output_rate}:channel_layouts=mono")
            sink = self.graph.add("abuffersink")
            source.link_to(converter)
            converter.link_to(sink)
            self.graph.configure()

    def resample(self, samples: np.ndarray) -> np.ndarray:
        """Takes `samples`, `[M]` float32 at the input rate, and returns what is ready, `[N]` at the output rate."""
        if self.graph is None or not len(samples):
            return samples
        chunks = [np.zeros(0, np.float32)]
        for start in range(0, len(samples), _FRAME_SAMPLES):
            piece = np.ascontiguousarray(samples[start : start + _FRAME_SAMPLES])
            frame = av.AudioFrame.from_ndarray(piece[None], format="flt", layout="mono")
            frame.sample_rate = self.input_rate
            self.graph.push(frame)
            with contextlib.suppress(BlockingIOError):  # raised when the graph needs more input
                while True:
                    chunks.append(self.graph.pull().to_ndarray()[0])
        return np.concatenate(chunks)
