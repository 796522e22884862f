"""Makes recordings for tests, in the many formats that libsndfile and PyAV can write."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import soundfile


def tone(rate: int, seconds: float = 2.0, hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    """Returns a file that libsndfile writes."""
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=format, subtype=subtype)
    return out.getvalue()


def encode_track(container, stream, wave: np.ndarray, rate: int, offset: int = 0) -> None:
    """Encodes `[N]` float32 into a stream of PyAV. Its first sample has the time `offset`, in samples."""
    frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
    position = offset
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        piece.pts = position
        position += piece.samples
        for packet in stream.encode(piece):
            container.mux(packet)
    for packet in stream.encode():
        container.mux(packet)


def from_phone(path: Path, format: str, codec: str, wave: np.ndarray, rate: int, **options: str) -> bytes:
    """Returns a file that FFmpeg writes with one mono audio track. It is also written to `path`."""
    with av.open(str(path), "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        encode_track(container, stream, wave, rate)
    return path.read_bytes()
