"""What lies between the microphone and our samples: automatic gain, a codec, lost packets.

`Line` describes it by numbers. `draw_line` draws a line, and `apply_line` sends the sound of a session through it.
Called by `jaxtml.data.talks.channel`.

The codecs are those of libsndfile. The clock of a real line drifts too, by up to 4 ms in a session of 20 s. That is
less than a tenth of a dMel frame, so nothing stands for it here.

Axis glossary: N samples of the session, B blocks of 10 ms.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from jaxtml.stream.timebase import SAMPLE_RATE

TELEPHONE_CODECS = {
    "pcmu": ("WAV", "ULAW"),
    "pcma": ("WAV", "ALAW"),
    "gsm": ("WAV", "GSM610"),
    "adpcm": ("WAV", "IMA_ADPCM"),
}
"""Codecs at 8 kHz, and what libsndfile calls them: G.711 in its two forms, GSM 06.10 full rate, IMA ADPCM."""

_TELEPHONE_HZ = 8000
_BLOCK, _PACKET = 160, 320  # samples: 10 ms in which gain is decided, 20 ms of one packet
_RISE_DB, _FALL_DB = 0.04, 0.6  # by which automatic gain may rise and fall in a block: 4 and 60 dB per second
_QUIET_DB = -55.0  # dBFS; blocks below it do not raise the gain


@dataclass(frozen=True)
class Line:
    """What happens to the microphone's sound on its way. The defaults change nothing.

    Attributes:
      gain_dbfs: level that automatic gain control aims at; None without it.
      codec: a key of `TELEPHONE_CODECS`, "opus", or None.
      opus_kbps: about the bit rate of Opus.
      loss: share of the packets of 20 ms that are lost.
      burst: packets that are lost in a row, on average.
      conceals: whether a lost packet repeats the sound before it, ever quieter. Otherwise it is silent.
    """

    gain_dbfs: float | None = None
    codec: str | None = None
    opus_kbps: float = 24.0
    loss: float = 0.0
    burst: float = 1.0
    conceals: bool = True


def draw_line(rng: np.random.Generator) -> Line:
    """Draws a line with one to three faults."""
    kind = rng.random()
    codec = None
    if kind < 0.4:
        codec = str(rng.choice(("pcmu", "pcmu", "pcma", "gsm", "adpcm")))
    elif kind < 0.55:
        codec = "opus"
    has_gain = rng.random() < 0.35
    loses = rng.random() < 0.35
    return Line(
        gain_dbfs=float(rng.uniform(-26, -14)) if has_gain else None,
        codec=codec,
        opus_kbps=float(rng.uniform(8, 32)),
        loss=float(np.exp(rng.uniform(np.log(0.003), np.log(0.08)))) if loses else 0.0,
        burst=float(rng.uniform(1.0, 3.0)),
        conceals=bool(rng.random() < 0.6),
    )


def apply_line(rng: np.random.Generator, line: Line, wave: np.ndarray) -> np.ndarray:
    """Returns `[N]` float32 what arrives of the microphone's sound `[N]`, within [-1, 1] but for the codec's errors."""
    if line.gain_dbfs is not None:
        wave = _control_gain(wave, line.gain_dbfs)
    wave = np.clip(wave, -1.0, 1.0)
    if line.codec == "opus":
        wave = _through_codec(wave, SAMPLE_RATE, "OGG", "OPUS", compression_level=1 - line.opus_kbps / 256)
    elif line.codec is not None:
        narrow = soxr.resample(wave, SAMPLE_RATE, _TELEPHONE_HZ)
        decoded = _through_codec(narrow, _TELEPHONE_HZ, *TELEPHONE_CODECS[line.codec])
        wave = _fit(soxr.resample(decoded, _TELEPHONE_HZ, SAMPLE_RATE), len(wave))
    if line.loss > 0:
        wave = _lose_packets(rng, wave, line)
    return wave


def _through_codec(
    wave: np.ndarray, rate_hz: int, container: str, subtype: str, compression_level: float | None = None
) -> np.ndarray:
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", rate_hz, 1, format=container, subtype=subtype, compression_level=compression_level
    ) as file:
        file.write(wave)
    buffer.seek(0)
    return _fit(soundfile.read(buffer, dtype="float32")[0], len(wave))


def _fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Cuts or pads to `length` samples. Codecs fill their last block."""
    return np.pad(wave[:length], (0, max(length - len(wave), 0)))


def _control_gain(wave: np.ndarray, target_dbfs: float) -> np.ndarray:
    """Brings speech to a level as a telephone does: slowly up, quickly down, and not in silence."""
    blocks = np.pad(wave, (0, -len(wave) % _BLOCK)).reshape(-1, _BLOCK)
    level_db = 10 * np.log10(np.mean(np.square(blocks), axis=1) + 1e-10)
    gains_db = np.empty(len(blocks), np.float32)
    gain_db = 0.0
    for block, db in enumerate(level_db.tolist()):
        wanted = min(max(target_dbfs - db, -20.0), 20.0)
        if wanted < gain_db:
            gain_db = max(gain_db - _FALL_DB, wanted)
        elif db > _QUIET_DB:
            gain_db = min(gain_db + _RISE_DB, wanted)
        gains_db[block] = gain_db
    gains_db = np.interp(np.arange(len(wave)), np.arange(len(blocks)) * _BLOCK, gains_db)
    return wave * (10 ** (gains_db / 20)).astype(np.float32)


def _lose_packets(rng: np.random.Generator, wave: np.ndarray, line: Line) -> np.ndarray:
    """Drops packets in bursts: a chain of two states whose share and mean length are those of `line`."""
    packets = len(wave) // _PACKET
    draws = rng.random(packets).tolist()
    begins, ends = line.loss / (line.burst * (1 - line.loss)), 1 / line.burst
    out = wave.copy()
    is_lost = False
    for packet, draw in enumerate(draws):
        is_lost = draw >= ends if is_lost else draw < begins
        if is_lost:
            at = packet * _PACKET
            before = out[at - _PACKET : at] if line.conceals and packet else 0.0
            out[at : at + _PACKET] = np.float32(0.7) * before
    return out
