"""Decodes a part of a recording into blocks of samples, and notes what a listener would want to know about it.

libsndfile decodes WAV, AIFF, CAF, AU and whole Ogg exactly. PyAV (FFmpeg) decodes everything else, such as the files of
phones and browsers. It also decodes the readable pieces of damaged files. Called by `jaxtml.stream.audio_file`.

Axes: n samples of a block, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np
import soundfile

from jaxtml.errors import InputError
from jaxtml.stream.audio_beginnings import Beginnings, Data
from jaxtml.stream.audio_parts import Part, PartFile, mp3_says_its_length

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

MAX_HOURS = 4
"""Longer recordings are refused."""

BLOCK_SECONDS = 60
"""Seconds of a file that are decoded at a time, so that memory never holds hours of stereo at 48 kHz."""

TOLERANCE_S = 0.1
"""A recording that is shorter than its header says by more than this was cut short."""

_GAP_S = 0.1  # shorter gaps between packets are roundings of their times

# Containers whose headers promise a duration that was measured, not estimated.
_PROMISING = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flac", "caf", "mp3")
# Containers whose packets have times of their own. Recorders leave packets out in silence and in pauses.
_TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "ogg")


class Block(NamedTuple):
    """Samples `[n, C]` float32 with full scale 1, and their rate in samples per second."""

    rate: int
    samples: np.ndarray


class NotAudio(Exception):
    """Nothing in the part can be decoded as audio. The message says why, and what to do."""


_NOT_AUDIO = (
    "not audio that can be read here, or damaged ({}); give WAV, FLAC, OGG, MP3, M4A, MP4 or WebM, for example from: "
    "ffmpeg -i INPUT -ar 16000 -ac 1 OUTPUT.wav"
)


def decode(data: Data, part: Part, limit_s: float, notes: list[str]) -> Iterator[Block]:
    """Yields the samples of a part, in order.

    Args:
      data: the file.
      part: from `find_parts`.
      limit_s: the most seconds that the part may last: `MAX_HOURS` less the length of the parts before it.
      notes: gets a sentence for everything that was left out or filled in.

    Raises:
      NotAudio: nothing can be decoded.
      InputError: the part is longer than `limit_s`.
    """
    done = 0
    if not part.by_av:
        try:
            for block in _decode_with_libsndfile(data, part, limit_s):
                done += len(block.samples)
                yield block
            return
        except soundfile.LibsndfileError:
            pass  # PyAV reads more kinds of files, and more of a damaged one
    for block in _decode_with_av(data, part, limit_s, notes):
        skipped = min(done, len(block.samples))
        done -= skipped
        yield Block(block.rate, block.samples[skipped:])


def _decode_with_libsndfile(data: Data, part: Part, limit_s: float) -> Iterator[Block]:
    with soundfile.SoundFile(cast(BinaryIO, PartFile(data, part))) as file:
        if file.seekable() and file.frames > limit_s * file.samplerate:
            raise too_long()
        while len(samples := file.read(BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)):
            yield Block(file.samplerate, samples)


def too_long() -> InputError:
    """Returns the error for a recording that is longer than `MAX_HOURS`, in one part or in all of its parts."""
    return InputError(f"longer than {MAX_HOURS} hours; cut it into shorter files")


# --- PyAV


def _decode_with_av(data: Data, part: Part, limit_s: float, notes: list[str]) -> Iterator[Block]:
    import av
    from av.error import FFmpegError

    if part.lacks_index:
        raise NotAudio("was cut short before its index (the box moov) was complete; repair it, for example by untrunc")
    try:
        # A playlist would make FFmpeg open other files and addresses, so no protocol is allowed.
        container = av.open(
            PartFile(data, part), "r", metadata_errors="replace", options={"protocol_whitelist": "none"}
        )
    except FFmpegError as error:
        raise NotAudio(_NOT_AUDIO.format(error.strerror or error)) from error
    with container:
        stream = _choose_track(container, notes)
        promised_s = _promised_s(container, stream, data, part)
        if promised_s > limit_s:
            raise too_long()
        track = _Track(container, stream, limit_s)
        waiting: list[np.ndarray] = []
        rate = 0
        for block in track.blocks():
            if waiting and (
                block.rate != rate
                or block.samples.shape[1] != waiting[0].shape[1]
                or sum(map(len, waiting)) > BLOCK_SECONDS * rate
            ):
                yield Block(rate, np.concatenate(waiting))
                waiting = []
            rate = block.rate
            waiting.append(block.samples)
        if waiting:
            yield Block(rate, np.concatenate(waiting))
    if track.heard_s == 0 and track.damage:
        raise NotAudio(_NOT_AUDIO.format(track.damage))
    if track.filled_s:
        notes.append(f"its pauses or gaps, {track.filled_s:.1f} s without any data, are heard as silence")
    if promised_s > track.heard_s + TOLERANCE_S:
        notes.append(cut_short(track.heard_s, promised_s))
    elif track.damage:
        notes.append(track.damage)
    if container.format.name == "flac" and (unheard := _behind_flac(data, part, track.last_packet_bytes)):
        notes.append(
            f"only its first {track.heard_s:.1f} s are heard: at least {unheard:,} bytes behind them are no FLAC; if "
            "they are another recording, give it as a file of its own"
        )
    if part.is_unknown and (joined := Beginnings(data).next(part.start + track.read_bytes)) < part.end:
        notes.append(
            f"only its first {track.heard_s:.1f} s are heard: another recording begins behind byte {joined:,}, and its "
            f"{part.end - joined:,} bytes are not heard; give it as a file of its own"
        )


def _behind_flac(data: Data, part: Part, last_packet_bytes: int) -> int:
    """Returns how many bytes at least are behind the last frame of a FLAC, and are no tag; 0 if none.

    A FLAC does not say where it ends. FFmpeg takes all that follows for a part of the last frame. The block STREAMINFO
    says how large the largest frame is (RFC 9639, section 8.2), or 0.
    """
    largest = int.from_bytes(data[part.start + 15 : part.start + 18], "big")
    has_tag = b"TAG" in data[max(part.start, part.end - 160) : part.end]  # ID3v1, or the end of an APE tag
    return max(0, last_packet_bytes - largest) if largest and not has_tag else 0


def cut_short(heard_s: float, promised_s: float) -> str:
    """Returns the note about a recording that ends before its header says."""
    return f"is cut short or damaged: it ends at {heard_s:.1f} s, and its header promises {promised_s:.1f} s"


def _choose_track(container: InputContainer, notes: list[str]) -> AudioStream:
    """Returns the track that players choose: the default one, else the first."""
    from av.stream import Disposition

    tracks = container.streams.audio
    if not tracks:
        what = "pictures without any sound" if container.streams.video else "no sound"
        raise NotAudio(f"holds {what}; give a recording with an audio track")
    chosen = next((track for track in tracks if track.disposition & Disposition.default), tracks[0])
    if len(tracks) > 1:
        name = chosen.metadata.get("language", "")
        name = f" ({name})" if name and name != "und" else ""
        notes.append(f"has {len(tracks)} audio tracks; track {tracks.index(chosen) + 1}{name} is heard")
    return chosen


def _promised_s(container: InputContainer, stream: AudioStream, data: Data, part: Part) -> float:
    """Returns the duration that the header promises, in seconds; 0 where it promises none."""
    kind = container.format.name
    if kind not in _PROMISING:
        return 0.0
    if kind == "mp3" and not mp3_says_its_length(data, part):
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    is_alone = len(container.streams) == 1
    return container.duration / 1e6 if is_alone and container.duration else 0.0


class _Track:
    """One audio track while it is decoded.

    Attributes:
      heard_s: seconds so far, with those filled in.
      filled_s: seconds of silence that were filled in for missing packets.
      damage: what could not be decoded, as a sentence; empty if nothing.
      read_bytes: bytes of the part up to the end of the last packet.
      last_packet_bytes: bytes of the last packet.
    """

    def __init__(self, container: InputContainer, stream: AudioStream, limit_s: float):
        self._container, self._stream, self._limit_s = container, stream, limit_s
        self._is_timed = container.format.name in _TIMED
        self._origin_s: float | None = None
        self.heard_s = self.filled_s = 0.0
        self.damage = ""
        self.read_bytes = self.last_packet_bytes = 0

    def blocks(self) -> Iterator[Block]:
        """Yields the track's frames. Damaged packets are left out."""
        from av.error import FFmpegError

        damaged, first_s = 0, 0.0
        packets = iter(self._container.demux(self._stream))
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                self.damage = f"is damaged: it ends at {self.heard_s:.1f} s ({error.strerror or error})"
                return
            if packet is None:
                break
            if packet.pos is not None and packet.pos >= 0:
                self.read_bytes = max(self.read_bytes, packet.pos + packet.size)
                self.last_packet_bytes = packet.size
            try:
                frames = packet.decode()
            except FFmpegError:
                first_s = first_s if damaged else self.heard_s
                damaged += 1
                continue
            for frame in frames:
                yield from self._blocks_of(frame)
        if damaged:
            count = "1 damaged piece was" if damaged == 1 else f"{damaged} damaged pieces were"
            self.damage = f"{count} left out, first at {first_s:.1f} s; it ends at {self.heard_s:.1f} s"

    def _blocks_of(self, frame: Any) -> Iterator[Block]:
        """Yields silence for the gap in front of a frame, if there is one, and the frame's samples."""
        samples = _samples(frame)
        time_s = frame.time
        if self._origin_s is None and time_s is not None:
            self._origin_s = time_s
        if self._is_timed and time_s is not None and self._origin_s is not None:
            gap_s = time_s - self._origin_s - self.heard_s
            if gap_s > _GAP_S:
                if self.heard_s + gap_s > self._limit_s:
                    raise too_long()
                self.filled_s += gap_s
                yield self._heard(frame.sample_rate, np.zeros((round(gap_s * frame.sample_rate), samples.shape[1])))
        yield self._heard(frame.sample_rate, samples)

    def _heard(self, rate: int, samples: np.ndarray) -> Block:
        self.heard_s += len(samples) / rate
        return Block(rate, samples.astype(np.float32, copy=False))


_FULL_SCALE = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31}


def _samples(frame: Any) -> np.ndarray:
    """Returns the samples `[n, C]` of a frame of PyAV, with full scale 1. Raises `NotAudio` for 64-bit integers."""
    try:
        array = frame.to_ndarray()
    except ValueError as error:  # integers of 64 bits, the only samples that PyAV does not hand over
        raise NotAudio(_NOT_AUDIO.format(f"samples of the kind {frame.format.name}")) from error
    channels = frame.layout.nb_channels
    samples = array.T if frame.format.is_planar else array.reshape(-1, channels)
    scale = _FULL_SCALE.get(array.dtype.str[1:])
    if scale is None:
        return samples
    return (samples - (scale if array.dtype.kind == "u" else 0)) / np.float32(scale)
