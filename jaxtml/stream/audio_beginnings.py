"""Finds the places in a file where a recording begins. A file may hold recordings of different kinds, end to end.

Called by `jaxtml.stream.audio_parts`, which walks over each container, and by `jaxtml.stream.audio_file` for files with
something else in front. The patterns are strict: compressed sound matches one of them less than once in a terabyte.

Sources: those of `jaxtml.stream.audio_parts`; https://id3.org/id3v2.3.0; the Xing header of MP3.
"""

from __future__ import annotations

import mmap
import re
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property

Data = mmap.mmap | bytes

RIFF_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
EBML = re.compile(rb"\x1aE\xdf\xa3.{1,60}?B\x82.(?:webm|matroska)", re.DOTALL)
FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
AMR = re.compile(rb"#!AMR(?:-WB)?\n")
XING = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]..(?:..)?(?:.{9}|.{17}|.{32})(?:Xing|Info)", re.DOTALL)
# One pattern for each kind: a pattern that begins with fixed bytes is searched ten times as fast as alternatives.
_PATTERNS = (
    *(re.compile(name + rb".{4}WAVE[ -~]{4}", re.DOTALL) for name in (b"RIFF", b"RF64", b"BW64", b"RIFX")),
    re.compile(rb"FORM.{4}AIF[FC][A-Z]{4}", re.DOTALL),
    re.compile(re.escape(RIFF_W64)),
    re.compile(rb"caff\x00\x01\x00\x00desc"),
    re.compile(rb"\.snd\x00\x00.{6}\x00\x00\x00[\x01-\x1b]\x00", re.DOTALL),
    re.compile(rb"OggS\x00[\x02\x06]\x00{8}"),
    *(EBML, FLAC, AMR, XING),
    re.compile(rb"RIFF.{4}AVI LIST", re.DOTALL),
    re.compile(re.escape(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c")),  # ASF, for WMA
)
_WAVPACK = re.compile(rb"wvpk.{4}[\x02-\x10]\x04", re.DOTALL)
_TRANSPORT_STREAM = re.compile(rb"G.{187}G.{187}G", re.DOTALL)
_MP4 = re.compile(rb"ftyp[ -~]{4}")
_ID3 = re.compile(rb"ID3[\x02-\x04][\x00-\xfe].[\x00-\x7f]{4}", re.DOTALL)


class Beginnings:
    """The places in a file where a recording begins for certain. The file is searched when a place is asked for."""

    def __init__(self, data: Data):
        self._data = data

    def next(self, position: int) -> int:
        """Returns the first beginning at or behind `position`; the end of the file if there is none."""
        index = bisect_left(self._all, position)
        return self._all[index] if index < len(self._all) else len(self._data)

    @cached_property
    def _all(self) -> list[int]:
        """The beginnings in order. A tag ID3 in front of a recording belongs to the recording."""
        found = set(self._without_tags())
        tags: dict[int, int] = {}  # the end of the tags -> where they begin
        for match in _ID3.finditer(self._data):
            tags.setdefault(id3_end(self._data, match.start()), match.start())
        for end, start in tags.items():
            if end in found or is_mp3_frame(self._data, end):
                found.discard(end)
                found.add(start)
        return sorted(found)

    def _without_tags(self) -> Iterator[int]:
        for pattern in _PATTERNS:
            for match in pattern.finditer(self._data):
                # The header of a FLAC is repeated in the first page of an Ogg with FLAC.
                if pattern is not FLAC or self._data[max(0, match.start() - 9) :][:5] != b"\x7fFLAC":
                    yield match.start()
        for match in _MP4.finditer(self._data):
            size = self._data[match.start() - 4 : match.start()]
            if match.start() >= 4 and size[:3] == bytes(3) and size[3] >= 8:
                yield match.start() - 4


def id3_end(data: Data, start: int) -> int:
    """Returns where the ID3v2 tags that begin at `start` end; `start` if none begins there."""
    while (head := data[start : start + 10])[:3] == b"ID3" and len(head) == 10:
        start += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return start


def is_mp3_frame(data: Data, start: int) -> bool:
    """Returns whether a frame of MP3 may begin at `start`."""
    head = data[start : start + 2]
    return len(head) == 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2


def adts_end(data: Data, start: int) -> int:
    """Returns where the frames of AAC (ADTS, ISO/IEC 14496-3) that begin at `start` end.

    Returns `start` if fewer than two frames follow each other there.
    """
    position = start
    count = 0
    while len(head := data[position : position + 7]) == 7 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if size < 7:
            break
        position += size
        count += 1
    return min(position, len(data)) if count > 1 else start


_MP3_KBIT_S = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2 and MPEG-2.5
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG-1
)
_MP3_RATES = (44100, 48000, 32000)


def _is_mp3_without_tags(data: Data, start: int) -> bool:
    """Whether three frames of an MP3 (ISO/IEC 11172-3, 2.4.2.3) follow each other from `start` on."""
    for _ in range(3):
        head = data[start : start + 4]
        if len(head) < 4 or not is_mp3_frame(data, start) or head[2] >> 4 in (0, 15) or head[2] >> 2 & 3 == 3:
            return False
        version = head[1] >> 3 & 3  # 3: MPEG-1; 2: MPEG-2, half the rate; 0: MPEG-2.5, a quarter
        rate = _MP3_RATES[head[2] >> 2 & 3] >> {3: 0, 2: 1}.get(version, 2)
        bit_s = 1000 * _MP3_KBIT_S[version == 3][head[2] >> 4]
        start += (144 if version == 3 else 72) * bit_s // rate + (head[2] >> 1 & 1)
    return True


def begins_weakly(data: Data, start: int) -> bool:
    """Returns whether a recording may begin at `start`, where another one has ended.

    Knows only the kinds that `Beginnings` does not search for, because their first bytes are too common in any file.
    """
    return (
        _WAVPACK.match(data, start) is not None
        or _TRANSPORT_STREAM.match(data, start) is not None
        or _is_mp3_without_tags(data, start)
        or adts_end(data, start) > start
    )


def name_bytes(data: bytes) -> str:
    """Returns a phrase that says what `data`, some bytes that are no recording, are."""
    if data.startswith(b"\xef\xbb\xbf") and len(data) == 3:
        return "a UTF-8 byte order mark"
    if not data.strip(b"\x00"):
        return "zeros"
    if not data.strip():
        return "white space"
    if re.match(rb"HTTP/\d", data):
        return "the head of an HTTP response"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "no audio"
    return "text" if text.replace("\r", "").replace("\n", "").replace("\t", "").isprintable() else "no audio"


_ARCHIVES = ((0, b"PK\x03\x04", "ZIP"), (0, b"\x1f\x8b", "gzip"), (0, b"7z\xbc\xaf", "7z"), (257, b"ustar", "tar"))


def archive_kind(data: Data) -> str:
    """Returns the kind of archive that a file is, for example "ZIP"; "" if it is none."""
    return next((kind for at, magic, kind in _ARCHIVES if data[at : at + len(magic)] == magic), "")
