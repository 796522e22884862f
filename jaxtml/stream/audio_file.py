"""Reads recordings of any kind as 16 kHz mono, and writes WAV, FLAC, Ogg and MP3 files.

Called wherever a user names a recording: by `converse`, the evaluations and the makers of data. Whatever is wrong with
a recording becomes an `InputError` here. What could be read in spite of a fault is heard, and a line in the log says
what was wrong.

Axes: N samples, n samples of a block, C channels.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
import sys
import tempfile
import wave as wave_format
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
import soxr
from absl import logging

from jaxtml.errors import InputError
from jaxtml.stream.audio_beginnings import Beginnings, Data, archive_kind, name_bytes
from jaxtml.stream.audio_decoding import MAX_HOURS, TOLERANCE_S, NotAudio, cut_short, decode, too_long
from jaxtml.stream.audio_level import Channels, level_notes
from jaxtml.stream.audio_parts import Part, find_parts
from jaxtml.stream.timebase import SAMPLE_RATE

AUDIO_ENDINGS = (".wav", ".flac", ".ogg", *([".mp3"] if "MP3" in soundfile.available_formats() else []))
"""The endings of names that `write_audio` writes. Old builds of libsndfile write no MP3."""

STDIN = "-"
"""The path that stands for standard input."""

# Larger samples are refused. Audio stays within [-1, 1], or exceeds it a little. Samples in the thousands are integers
# that somebody stored as floats.
_LOUDEST = 16.0
_MOST_PIPED = 4 << 30  # bytes that are read from a pipe: more than four hours of 16-bit stereo at 48 kHz
_MOST_WAV = (1 << 32) - 64  # the most bytes of samples in a WAV file, whose header has 32 bits for a length


_NO_SOUND = "holds no sound at all (zero samples); give a recording with audio in it"


def read_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the recording as `[N]` float32 at 16 kHz, full scale at -1 and 1.

    Channels are averaged, unless they cancel each other. soxr resamples. Files that were joined end to end, also of
    different kinds, are heard one after the other. What is in front of the first recording is left out. The log has a
    line for each fault: what was cut short, left out, filled in, clipped, or is silent or very quiet.

    Args:
      path: the file; "-" for standard input. It may be a pipe.

    Raises:
      InputError: the file cannot be read, is damaged, empty or too long, or has NaN, infinite or far too large samples.
    """
    name = "standard input" if os.fspath(path) == STDIN else os.fspath(path)
    notes: list[str] = []
    try:
        with _mapped(path) as data:
            wave = _read(data, path, notes)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    for note in [*notes, *level_notes(wave)]:
        logging.warning("%s: %s", name, note)
    return wave


def write_wav(path: str | os.PathLike[str], wave: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes audio as a 16-bit WAV file, whole or not at all.

    Args:
      path: the file, replaced if it is there. Its name ends in ".wav", or has no ending.
      wave: `[N]` (mono) or `[N, 2]` (stereo) floats in [-1, 1]; louder samples are clipped.
      rate: samples per second.

    Raises:
      InputError: the name has another ending, or the place cannot be written, or has no space left.
      ValueError: `wave` has another shape or dtype, or NaN, infinite or far too large samples; or `rate` is not
        positive.
    """
    if check_ending(path, AUDIO_ENDINGS) not in ("", ".wav"):
        raise InputError(f"{path}: this writes WAV; let the name end in .wav")
    _write(path, _wav_bytes(_checked(wave, rate), rate))


def write_audio(path: str | os.PathLike[str], wave: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes audio in the format that the name of the file promises, whole or not at all.

    The names end as `AUDIO_ENDINGS` says. WAV and FLAC have 16 bits; Ogg (Vorbis) and MP3 lose a little. All keep the
    length. A name without an ending is a WAV file. Arguments and errors are those of `write_wav`.
    """
    ending = check_ending(path, AUDIO_ENDINGS)
    if ending in ("", ".wav"):
        write_wav(path, wave, rate)
        return
    wave = np.clip(_checked(wave, rate), -1, 1)
    samples = _int16(wave) if ending == ".flac" else wave
    buffer = io.BytesIO()
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(buffer, "w", rate, channels, format=ending[1:].upper()) as file:
        for start in range(0, len(samples), rate):  # libsndfile crashes when it is given minutes of Vorbis at once
            file.write(samples[start : start + rate])
    _write(path, buffer.getvalue())


def check_ending(path: str | os.PathLike[str], endings: Sequence[str]) -> str:
    """Returns the ending of a file's name in lower case, such as ".wav"; "" where the name promises no format.

    Raises:
      InputError: the ending is not in `endings`, or the file is a folder.
    """
    ending = Path(path).suffix.lower()
    if Path(path).is_dir():  # the name of a folder may have a dot
        raise InputError(f"{path}: cannot be written, because it is a folder; name a file")
    if ending and ending not in endings:
        raise InputError(f"{path}: cannot be written as {ending[1:]!r}; let its name end in {', '.join(endings)}")
    return ending


def _checked(wave: np.ndarray, rate: int) -> np.ndarray:
    """Returns audio that can be written. Raises `ValueError` as `write_wav`."""
    wave = np.asarray(wave)
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and wave.shape[1] not in (1, 2)):
        raise ValueError(f"audio to write is [N] or [N, 2], got {wave.shape}")
    if wave.dtype.kind != "f":
        raise ValueError(f"audio to write is floats in [-1, 1], got {wave.dtype}; divide 16-bit samples by 32768.0")
    if not np.isfinite(wave).all():
        raise ValueError("audio to write has NaN or infinite samples")
    if (peak := np.abs(wave).max(initial=0)) > _LOUDEST:
        raise ValueError(f"audio to write reaches {peak:.0f} where full scale is 1; scale it to [-1, 1]")
    if rate != int(rate) or rate < 1:
        raise ValueError(f"the rate is {rate}; give whole samples per second, at least 1")
    if 2 * wave.size > _MOST_WAV:
        raise ValueError(f"audio to write has {wave.size} samples, more than a file holds; cut it into pieces")
    return wave


def _write(path: str | os.PathLike[str], content: bytes) -> None:
    try:
        _write_atomically(Path(path), content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: no space left there; free some, or write elsewhere") from error
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def _mapped(path: str | os.PathLike[str]) -> Iterator[Data]:
    """Yields the bytes of a file. What comes through a pipe is first copied into a temporary file.

    Raises:
      InputError: the path cannot be opened, or nothing is there. The message does not name the path.
    """
    with ExitStack() as stack:
        file = stack.enter_context(_opened(path))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            copy = stack.enter_context(tempfile.TemporaryFile())
            _copy_pipe(file, copy)
            file = copy
        if os.fstat(file.fileno()).st_size == 0:
            raise InputError("is empty (0 bytes); give a recording with audio in it")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _opened(path: str | os.PathLike[str]) -> IO[bytes]:
    if os.fspath(path) == STDIN:
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("is closed; pipe a recording in, as in: jaxtml converse --in - < user.wav")
        if sys.stdin.isatty():
            raise InputError("is a terminal, not a recording; pipe one in, as in: jaxtml converse --in - < user.wav")
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise InputError("no such file; give the path of a recording") from error
    except IsADirectoryError as error:
        raise InputError("is a directory; give one audio file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be opened ({error}); give a readable audio file") from error


def _copy_pipe(source: IO[bytes], target: IO[bytes]) -> None:
    copied = 0
    while piece := source.read(1 << 20):
        copied += len(piece)
        if copied > _MOST_PIPED:
            raise InputError(f"more than {_MOST_PIPED >> 30} GiB come through this pipe; give shorter recordings")
        target.write(piece)
    target.flush()


def _read(data: Data, path: str | os.PathLike[str], notes: list[str]) -> np.ndarray:
    """Returns the file's audio `[N]` at 16 kHz. Bytes in front of the first recording are left out, with a note."""
    parts = find_parts(data)
    try:
        return _hear(data, parts, notes)
    except NotAudio as error:
        if kind := archive_kind(data):
            raise InputError(f"is a {kind} archive, not a recording: unpack it, and give a file from it") from error
        if Path(path).suffix.lower() in (".raw", ".pcm"):
            raise InputError("raw samples without a header; give WAV, FLAC, OGG or MP3") from error
        begin = Beginnings(data).next(parts[0].start) if parts[0].is_unknown else len(data)
        if begin == len(data):
            raise InputError(str(error)) from error
    front = f"{begin} bytes" if begin > 1 else "byte"
    notes[:] = [f"its first {front} ({name_bytes(data[:begin])}) are left out: a recording begins behind them"]
    try:
        return _hear(data, find_parts(data, begin), notes)
    except NotAudio as error:
        raise InputError(
            f"{error}; behind its first {front} there may be a recording, which cannot be read either"
        ) from error


def _hear(data: Data, parts: list[Part], notes: list[str]) -> np.ndarray:
    """Returns the audio of all parts `[N]`. If the channels cancel each other, one may be heard alone."""
    channels = Channels()
    wave = np.concatenate([np.empty(0, np.float32), *_mono_blocks(data, parts, notes, channels, None)])
    if (best := channels.best) is not None:
        wave = np.concatenate(list(_mono_blocks(data, parts, [], Channels(), best)))
    if len(wave) == 0:
        raise InputError(_NO_SOUND)
    notes += channels.notes()
    return wave


def _mono_blocks(
    data: Data, parts: list[Part], notes: list[str], channels: Channels, chosen: int | None
) -> Iterator[np.ndarray]:
    """Yields all parts as mono blocks at 16 kHz, in order. `chosen` is the only channel to hear; None: all."""
    total_s = 0.0
    unreadable: list[NotAudio] = []
    for number, part in enumerate(parts):
        resampler = _Resampler()
        heard_s = 0.0
        part_notes: list[str] = []
        try:
            for rate, block in decode(data, part, MAX_HOURS * 3600 - total_s, part_notes):
                _check_samples(block, total_s + heard_s)
                channels.add(rate, block)
                heard_s += len(block) / rate
                if total_s + heard_s > MAX_HOURS * 3600:
                    raise too_long()
                mono = block.mean(axis=1) if chosen is None else block[:, min(chosen, block.shape[1] - 1)]
                yield from resampler.resample(rate, mono)
            yield from resampler.rest()
            if heard_s == 0 and len(parts) > 1:
                raise NotAudio(_NO_SOUND)
        except NotAudio as error:
            unreadable.append(error)
            part_notes.append(f"its joined recording {number + 1} cannot be read: {error}")
        notes += part_notes
        if abs(part.promised - 1) * heard_s > TOLERANCE_S and part.promised and not part_notes:
            notes.append(_wrong_length(heard_s, part.promised * heard_s))
        elif part.is_damaged and not part_notes:
            notes.append(f"is damaged: pieces of it are missing; it ends at {total_s + heard_s:.1f} s")
        elif part.has_no_end and not part_notes:
            notes.append(f"has no end mark, so it may have been cut short: it ends at {total_s + heard_s:.1f} s")
        total_s += heard_s
    if len(unreadable) == len(parts):
        raise unreadable[0]
    if len(parts) > 1:
        which = "all are heard" if not unreadable else f"the other {len(parts) - len(unreadable)} can be read"
        notes.append(f"holds {len(parts)} recordings, joined end to end; {which}")


def _wrong_length(heard_s: float, promised_s: float) -> str:
    if promised_s > heard_s:
        return cut_short(heard_s, promised_s)
    return f"its header promises {promised_s:.1f} s, but {heard_s:.1f} s are there; all of it is heard"


class _Resampler:
    """Resamples mono blocks to 16 kHz. The rate may change between blocks."""

    def __init__(self):
        self._rate = SAMPLE_RATE
        self._stream: soxr.ResampleStream | None = None

    def resample(self, rate: int, mono: np.ndarray) -> Iterator[np.ndarray]:
        """Yields what is ready after a block `[n]` float32."""
        if rate != self._rate:
            yield from self.rest()
            self._rate = rate
            self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        yield mono if self._stream is None else self._stream.resample_chunk(np.ascontiguousarray(mono))

    def rest(self) -> Iterator[np.ndarray]:
        """Yields what the resampler still holds."""
        if self._stream is not None:
            yield self._stream.resample_chunk(np.empty(0, np.float32), last=True)
            self._stream, self._rate = None, SAMPLE_RATE


def _check_samples(block: np.ndarray, start_s: float) -> None:
    """Raises `InputError` if a block has NaN, infinite or far too large samples. The block begins at `start_s`."""
    if not np.isfinite(block).all():
        raise InputError(f"has NaN or infinite samples after {start_s:.0f} s; export it again as 16-bit WAV")
    if (peak := np.abs(block).max(initial=0)) > _LOUDEST:
        raise InputError(f"samples reach {peak:.0f} where full scale is 1; scale them to [-1, 1]")


def _int16(wave: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype("<i2")


def _wav_bytes(wave: np.ndarray, rate: int) -> bytes:
    """Returns a WAV file. Reading and writing both scale by 32768, so samples of 16 bits come back unchanged."""
    samples = _int16(wave)
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
