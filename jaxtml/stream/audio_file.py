"""Reads WAV, FLAC, OGG and MP3 files as 16 kHz mono, and writes WAV files.

Called wherever a user names a recording: by `converse`, the evaluations and the makers of data. Whatever is wrong with
a recording becomes an `InputError` here.

Axes: N samples.
"""

from __future__ import annotations

import errno
import io
import os
import wave as wave_format
from pathlib import Path

import numpy as np
import soundfile
import soxr

from jaxtml.errors import InputError
from jaxtml.stream.timebase import SAMPLE_RATE

MAX_HOURS = 4
"""Longer recordings are refused."""

_BLOCK_SECONDS = 60  # seconds of the file that are read at a time, so that memory never holds hours of stereo at 48 kHz
# Larger samples are refused. Audio stays within [-1, 1], or exceeds it a little. Samples in the thousands are integers
# that somebody stored as floats.
_LOUDEST = 16.0


def read_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the recording as `[N]` float32 at 16 kHz, full scale at -1 and 1.

    Channels are averaged. soxr resamples.

    Raises:
      InputError: the file cannot be read, is damaged, empty or too long, or has NaN, infinite or far too large samples.
    """
    _check_openable(path)
    try:
        with _open(path) as file:
            if file.seekable() and file.frames > MAX_HOURS * 3600 * file.samplerate:
                raise _too_long(path)
            blocks = _resampled_blocks(path, file)
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{path}: not audio that can be read here, or damaged; give WAV, FLAC, OGG or MP3, "
            f"for example from: ffmpeg -i INPUT -ar 16000 -ac 1 OUTPUT.wav"
        ) from error
    audio = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    if len(audio) == 0:
        raise InputError(f"{path}: holds no sound at all (zero samples); give a recording with audio in it")
    return audio


def write_wav(path: str | os.PathLike[str], wave: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes audio as a 16-bit WAV file, whole or not at all.

    Args:
      path: the file, replaced if it is there.
      wave: `[N]` (mono) or `[N, 2]` (stereo) floats in [-1, 1]; louder samples are clipped.
      rate: samples per second.

    Raises:
      InputError: the place cannot be written, or has no space left.
      ValueError: `wave` has another shape, or NaN or infinite samples.
    """
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and wave.shape[1] not in (1, 2)):
        raise ValueError(f"audio to write is [N] or [N, 2], got {wave.shape}")
    if not np.isfinite(wave).all():
        raise ValueError("audio to write has NaN or infinite samples")
    try:
        _write_atomically(Path(path), _wav_bytes(wave, rate))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: no space left there; free some, or write elsewhere") from error
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _check_openable(path: str | os.PathLike[str]) -> None:
    """Raises an `InputError` that says what is wrong with the path.

    soundfile itself would only say "System error" in each of these cases.
    """
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the path of a recording") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory; give one audio file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({error}); give a readable audio file") from error
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes); give a recording with audio in it")


def _open(path: str | os.PathLike[str]) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(os.fspath(path))
    except TypeError as error:  # soundfile raises it for a name that ends in .raw
        raise InputError(f"{path}: raw samples without a header; give WAV, FLAC, OGG or MP3") from error


def _resampled_blocks(path: str | os.PathLike[str], file: soundfile.SoundFile) -> list[np.ndarray]:
    """Returns every block of the file as mono 16 kHz float32, in order."""
    rate = file.samplerate
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    blocks = []
    frames = 0
    while len(block := file.read(_BLOCK_SECONDS * rate, dtype="float32", always_2d=True)):
        _check_samples(path, block, frames / rate)
        mono = block.mean(axis=1)
        frames += len(mono)
        if frames > MAX_HOURS * 3600 * rate:
            raise _too_long(path)
        blocks.append(resampler.resample_chunk(mono) if resampler else mono)
    if resampler and frames:
        blocks.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    return blocks


def _check_samples(path: str | os.PathLike[str], block: np.ndarray, start_s: float) -> None:
    """Raises `InputError` if a block has NaN, infinite or far too large samples. The block begins at `start_s`."""
    if not np.isfinite(block).all():
        raise InputError(f"{path}: has NaN or infinite samples after {start_s:.0f} s; export it again as 16-bit WAV")
    if (peak := np.abs(block).max()) > _LOUDEST:
        raise InputError(f"{path}: samples reach {peak:.0f} where full scale is 1; scale them to [-1, 1]")


def _too_long(path: str | os.PathLike[str]) -> InputError:
    return InputError(f"{path}: longer than {MAX_HOURS} hours; cut it into shorter files")


def _wav_bytes(wave: np.ndarray, rate: int) -> bytes:
    """Returns a WAV file. Reading and writing both scale by 32768, so samples of 16 bits come back unchanged."""
    samples = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave_format.open(buffer, "wb") as out:
        out.setnchannels(1 if wave.ndim == 1 else wave.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return buffer.getvalue()


def _write_atomically(path: Path, content: bytes) -> None:
    """Writes a file beside the target, then renames it onto the target. A reader never finds half a file."""
    if path.exists() and not path.is_file():  # A rename cannot replace a device such as /dev/stdout.
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
