"""Finds the parts of a recording's file: files that were joined end to end, and headers whose lengths are wrong.

Programs that write into a pipe cannot go back to fill in the lengths. A program that is killed does not either.
Decoders believe the lengths, and then decode nothing or only a piece. Of joined files, they decode only the first.
So `find_parts` walks over the containers here, and `jaxtml.stream.audio_decoding` decodes each part on its own.

Sources: the RIFF and WAVE specification of 1991; EBU Tech 3306 (RF64); Sony's Wave64; Apple's AIFF-C and CAF; RFC 3533
(Ogg); RFC 9639 (FLAC); RFC 4867 (AMR); ISO/IEC 14496-12 (MP4); RFC 8794 (EBML, for WebM).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass

from jaxtml.stream.audio_beginnings import (
    AMR,
    EBML,
    FLAC,
    RIFF_W64,
    XING,
    Beginnings,
    Data,
    adts_end,
    begins_weakly,
    id3_end,
    is_mp3_frame,
)


@dataclass(frozen=True)
class Part:
    """A stretch of a file that is a recording of its own.

    Attributes:
      start, end: the bytes of the file.
      header: bytes to put in front, when the file's own header is wrong. `start` is then the first sample.
      promised: the length that the header promises, divided by the length that is there; 1 where it promises nothing.
      has_no_end: the container marks its end, and the mark is missing.
      is_damaged: pieces of an Ogg file are missing, or their checksums are wrong.
      lacks_index: an MP4 without the whole box `moov`, which no decoder can read.
      by_av: PyAV decodes this container; libsndfile cannot, or hears less of it.
      is_unknown: the container is none of those that this module knows. It reaches to the end of the file.
    """

    start: int
    end: int
    header: bytes = b""
    promised: float = 1.0
    has_no_end: bool = False
    is_damaged: bool = False
    lacks_index: bool = False
    by_av: bool = False
    is_unknown: bool = False


class PartFile(io.RawIOBase):
    """The bytes of a part, as a file that decoders read."""

    def __init__(self, data: Data, part: Part):
        super().__init__()
        self._data, self._part, self._position = data, part, 0
        self._size = len(part.header) + part.end - part.start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (0, self._position, self._size)[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        header, begin = self._part.header, self._position
        end = min(begin + len(buffer), self._size)
        piece = header[begin:end]
        first = self._part.start - len(header)  # the byte of the file that position 0 would be
        piece += self._data[first + max(begin, len(header)) : first + max(end, len(header))]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def find_parts(data: Data, start: int = 0) -> list[Part]:
    """Returns the parts of a file from the byte `start` on, in order. The kinds of the parts may differ."""
    beginnings = Beginnings(data)
    parts: list[Part] = []
    while True:
        part, following = _part_at(data, start, beginnings)
        parts.append(part)
        if following >= len(data):
            return parts
        start = following


def _part_at(data: Data, start: int, beginnings: Beginnings) -> tuple[Part, int]:
    """Returns the part that begins at `start`, and where the next one begins: at the file's end if none follows."""
    tag_start, tag_end = start, id3_end(data, start)
    if is_mp3_frame(data, tag_end):
        end = beginnings.next(_search_start_in_mp3(data, tag_end))
        return Part(start, end, by_av=True), end
    start = tag_end  # players skip a tag in front of any kind of file; libsndfile does not
    head = data[start : start + 12]
    if layout := _layout_at(data, start):
        return _chunked_part(data, start, layout, beginnings)
    if head[:4] == b".snd" and len(data) - start > 24:
        return _au_part(data, start, beginnings)
    if head[:4] == b"OggS":
        return _ogg_part(data, start, beginnings)
    if head[4:8] == b"ftyp":
        return _mp4_part(data, start, beginnings)
    if EBML.match(data, start):
        return _webm_part(data, start, beginnings)
    if FLAC.match(data, start):
        end = beginnings.next(_flac_head_end(data, start))
        return Part(start, end, by_av=True), end
    if AMR.match(data, start):
        end = beginnings.next(start + 6)
        return Part(start, end), end
    if (end := adts_end(data, start)) > start:
        end = beginnings.next(end)
        return Part(start, end, by_av=True), end
    is_recording = beginnings.next(tag_start) == tag_start or begins_weakly(data, start)
    if tag_end > tag_start and not is_recording:  # an MP3 with padding behind its tag
        end = beginnings.next(min(_search_start_in_mp3(data, tag_end), len(data)))
        return Part(tag_start, end, by_av=True), end
    # libsndfile takes some bytes in front of a recording for sound.
    return Part(start, len(data), is_unknown=True, by_av=beginnings.next(start) < len(data)), len(data)


# --- WAV, RF64, Wave64, AIFF and CAF: chunks with an id and a size


@dataclass(frozen=True)
class _Layout:
    """How a container writes its chunks.

    Attributes:
      head: bytes of the container's header.
      id_bytes: bytes of a chunk's id.
      size: `struct` format of a chunk's size.
      pad: a chunk begins at a multiple of this many bytes.
      sound: id of the chunk with the samples.
      counts_header: a chunk's size counts its id and its size too.
    """

    head: int
    id_bytes: int
    size: str
    pad: int
    sound: bytes
    counts_header: bool = False

    @property
    def chunk_head(self) -> int:
        return self.id_bytes + struct.calcsize(self.size)


_W64 = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"  # the end of every GUID of Wave64
_WAVE = _Layout(12, 4, "<I", 2, b"data")
_WAVE_BIG_ENDIAN = _Layout(12, 4, ">I", 2, b"data")
_WAVE64 = _Layout(40, 16, "<Q", 8, b"data" + _W64, counts_header=True)
_AIFF = _Layout(12, 4, ">I", 2, b"SSND")
_CAF = _Layout(8, 4, ">Q", 1, b"data")

# A mended header repeats the chunks that stand before the samples: of each chunk, at most this many bytes. Only chunks
# with pictures are longer.
_MOST_KEPT = 1 << 20
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")  # tags that players append behind the last chunk


def _layout_at(data: Data, start: int) -> _Layout | None:
    """Returns the layout of the container that begins at `start`, or None."""
    head = data[start : start + 16]
    kind = head[:4], head[8:12]
    if kind in ((b"RIFF", b"WAVE"), (b"RF64", b"WAVE"), (b"BW64", b"WAVE")):
        return _WAVE
    if kind == (b"RIFX", b"WAVE"):
        return _WAVE_BIG_ENDIAN
    if kind in ((b"FORM", b"AIFF"), (b"FORM", b"AIFC")):
        return _AIFF
    if head == RIFF_W64:
        return _WAVE64
    return _CAF if head[:6] == b"caff\x00\x01" else None


def _chunked_part(data: Data, start: int, layout: _Layout, beginnings: Beginnings) -> tuple[Part, int]:
    position, kept, is_misaligned = start + layout.head, [], False
    while True:
        chunk = _chunk_at(data, position, layout)
        if chunk is None:
            return Part(start, len(data)), len(data)
        name, size, body = chunk
        if name == layout.sound:
            break
        kept.append((name, data[body : body + min(size, _MOST_KEPT)]))
        position, is_aligned = _next_chunk(data, start, body + size, layout)
        is_misaligned |= not is_aligned
    if layout is _WAVE and size == 0xFFFFFFFF:
        size = next((struct.unpack("<Q", ds64[8:16])[0] for name, ds64 in kept if name == b"ds64"), size)
    following = _end_of_chunks(data, start, body + size, layout, beginnings) if body + size <= len(data) else None
    if following is not None and not is_misaligned:
        return Part(start, following), following
    # From here on, the padding of a chunk is missing, or the length of the samples is wrong. Decoders would look for
    # the samples in the wrong place, or believe the wrong length. So the part gets a new header.
    end, promised = body + size, 1.0
    if following is None:
        end = following = beginnings.next(body)
        promised = 1.0 if _is_open(size) or end == body else size / (end - body)
    header = _header(data[start : start + layout.head], kept, end - body, layout)
    return Part(body, end, header, promised), following


def _chunk_at(data: Data, position: int, layout: _Layout) -> tuple[bytes, int, int] | None:
    """Returns the id and the size of the chunk at `position`, and where its body begins; None behind the last one."""
    head = data[position : position + layout.chunk_head]
    if len(head) < layout.chunk_head:
        return None
    size = struct.unpack(layout.size, head[layout.id_bytes :])[0]
    if layout.counts_header:
        size = max(0, size - layout.chunk_head)
    return head[: layout.id_bytes], size, position + layout.chunk_head


def _next_chunk(data: Data, start: int, end: int, layout: _Layout) -> tuple[int, bool]:
    """Returns where the chunk behind `end` begins, and whether it is where the container wants it.

    Some programs forget the byte that pads a chunk of odd length.
    """
    aligned = end + (start - end) % layout.pad
    if aligned != end and not _is_chunk(data, aligned, layout) and _is_chunk(data, end, layout):
        return end, False
    return aligned, True


def _is_chunk(data: Data, position: int, layout: _Layout) -> bool:
    """Whether a chunk may begin at `position`: its id is text, and it ends within the file or holds the samples."""
    chunk = _chunk_at(data, position, layout)
    if chunk is None:
        return False
    name, size, body = chunk
    is_name = name[4:] == _W64 if layout is _WAVE64 else all(0x20 <= byte < 0x7F for byte in name)
    return is_name and (name == layout.sound or body + size <= len(data))


def _end_of_chunks(data: Data, start: int, end: int, layout: _Layout, beginnings: Beginnings) -> int | None:
    """Returns where the chunks behind the samples end: at the file's end, or at another recording.

    None if what is behind the samples is no chunk, so that the length of the samples must be wrong.
    """
    while end < len(data):
        if _begins_recording(data, end, beginnings):
            return end
        position, _ = _next_chunk(data, start, end, layout)
        if _begins_recording(data, position, beginnings):
            return position
        if len(data) - position < layout.chunk_head or data[position : position + 11].startswith(_TAGS):
            return beginnings.next(position)
        if not _is_chunk(data, position, layout):
            return None
        _, size, body = _chunk_at(data, position, layout) or (b"", 0, 0)
        end = body + size
    return len(data)


def _begins_recording(data: Data, position: int, beginnings: Beginnings) -> bool:
    """Whether a recording begins at `position`, where a container ends."""
    return _layout_at(data, position) is not None or (
        position < len(data) and (beginnings.next(position) == position or begins_weakly(data, position))
    )


def _is_open(size: int) -> bool:
    """Whether a length stands for "unknown". ffmpeg, sox, arecord and CAF write different ones into pipes."""
    return 0x7FFF0000 <= size <= 0x80000000 or 0xFFFF0000 <= size <= 0xFFFFFFFF or size >= 1 << 62


def _header(head: bytes, kept: list[tuple[bytes, bytes]], size: int, layout: _Layout) -> bytes:
    """Returns the container's header and chunks, up to the first sample, with the true length `size`."""
    if layout is _WAVE:
        head = b"RIFF\xff\xff\xff\xffWAVE"  # RF64 would need its chunk ds64, which is wrong too
    largest = (1 << 8 * struct.calcsize(layout.size)) - 1
    extra = layout.chunk_head if layout.counts_header else 0
    out = bytearray(head)
    for name, body in kept:
        if name == b"ds64":
            continue
        out += name + struct.pack(layout.size, len(body) + extra) + body
        out += bytes(-len(out) % layout.pad)
    return bytes(out + layout.sound + struct.pack(layout.size, min(size + extra, largest)))


# --- the other containers


def _au_part(data: Data, start: int, beginnings: Beginnings) -> tuple[Part, int]:
    """Returns a file of Sun's AU format. It says the length of its samples, or 0xFFFFFFFF for "unknown"."""
    first, size = struct.unpack(">II", data[start + 4 : start + 12])
    begin = start + first
    if not first >= 24 or begin >= len(data):
        return Part(start, len(data)), len(data)
    end = begin + size
    if end > len(data) or not _begins_recording(data, end, beginnings):
        end = beginnings.next(begin)
    there = end - begin
    if size == there or there == 0:
        return Part(start, end), end
    header = data[start : start + 8] + b"\xff\xff\xff\xff" + data[start + 12 : begin]
    return Part(begin, end, header, 1.0 if _is_open(size) else size / there), end


def _ogg_part(data: Data, start: int, beginnings: Beginnings) -> tuple[Part, int]:
    """Returns a link of a chained Ogg file (RFC 3533, section 4). A link begins with pages marked as a beginning.

    libsndfile leaves out damaged and missing pages, so that all later sound is too early. PyAV says at what time each
    frame belongs, so PyAV decodes the damaged links.
    """
    position = start
    is_beginning, has_end, is_damaged = True, False, False
    numbers: dict[bytes, int] = {}  # serial number of a stream -> number of its next page
    while True:
        end = _ogg_page_end(data, position)
        if end is None:
            following = data.find(b"OggS", position + 4)
            if following < 0:  # the last page is cut
                has_end = False
            is_damaged |= following >= 0 and not _begins_ogg(data, following)
        else:
            begins, serial = _begins_ogg(data, position), data[position + 14 : position + 18]
            if begins and not is_beginning:
                end_of_link = position
                break
            number = struct.unpack("<I", data[position + 18 : position + 22])[0]
            is_damaged |= numbers.get(serial, number) != number
            numbers[serial] = number + 1
            is_beginning = begins
            has_end = has_end or bool(data[position + 5] & 4)
            following = data.find(b"OggS", end)
        if end is None or following != end:  # no page follows at once: another kind of file may
            behind = position + 4 if end is None else end
            other = behind if end and _begins_recording(data, end, beginnings) else beginnings.next(behind)
            if other < (following if following >= 0 else len(data)):
                end_of_link = other
                break
        if following < 0:
            end_of_link = len(data)
            break
        position = following
    return Part(start, end_of_link, has_no_end=not has_end, is_damaged=is_damaged, by_av=is_damaged), end_of_link


def _begins_ogg(data: Data, page: int) -> bool:
    return bool(data[page + 5 : page + 6] and data[page + 5] & 2)


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_page_end(data: Data, page: int) -> int | None:
    """Returns where the page that begins at `page` ends; None if the page is cut, or its checksum is wrong."""
    head = data[page : page + 27]
    if len(head) < 27:
        return None
    table = data[page + 27 : page + 27 + head[26]]
    end = page + 27 + head[26] + sum(table)
    if end > len(data) or len(table) < head[26]:
        return None
    # The checksum of Ogg is that of zlib, but with the bits of each byte and of the result in reverse order, and
    # without the two complements. The checksum itself counts as zero.
    content = (head[:22] + bytes(4) + data[page + 26 : end]).translate(_REVERSED)
    checksum = int(f"{zlib.crc32(content, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)
    return end if checksum == struct.unpack("<I", head[22:26])[0] else None


def _mp4_part(data: Data, start: int, beginnings: Beginnings) -> tuple[Part, int]:
    """Returns a file of MP4 boxes. It ends where the box `ftyp` of the next file, or another recording, begins."""
    position = start
    has_index = is_cut = False
    while position + 8 <= len(data):
        if position > start and _begins_recording(data, position, beginnings):
            return Part(start, position, lacks_index=not has_index, by_av=True), position
        size, kind = struct.unpack(">I4s", data[position : position + 8])
        if size == 1 and position + 16 <= len(data):
            size = struct.unpack(">Q", data[position + 8 : position + 16])[0]
        has_index |= kind == b"moov" and position + size <= len(data)
        is_cut = kind in (b"moof", b"mdat") and position + size > len(data)
        if size < 8 or position + size > len(data):  # 0: the box reaches to the end of the file
            break
        position += size
    end = beginnings.next(position + 8)
    return Part(start, end, has_no_end=is_cut, lacks_index=not has_index, by_av=True), end


def _webm_part(data: Data, start: int, beginnings: Beginnings) -> tuple[Part, int]:
    """Returns a WebM.

    Its head may hold the head of a FLAC, which is no recording of its own. So the next recording is searched for from
    the end that the head promises. Where the file has no such place, the search starts at the first cluster of sound.
    """
    promised_end = _segment_end(data, start)
    cluster = data.find(_CLUSTER, start)
    behind = promised_end if 0 < promised_end <= len(data) else max(cluster, start + 4)
    end = behind if behind == promised_end and begins_weakly(data, behind) else beginnings.next(behind)
    return Part(start, end, has_no_end=promised_end > end, by_av=True), end


def _segment_end(data: Data, start: int) -> int:
    """Returns where the WebM that begins at `start` ends by its header; 0 if the header does not say it."""
    match = _SEGMENT.search(data, start, start + 200)
    if match is None:
        return 0
    width = 9 - data[match.end()].bit_length()  # the first bit that is set says how many bytes the size has
    value = int.from_bytes(data[match.end() : match.end() + width], "big") & ((1 << 7 * width) - 1)
    return 0 if value == (1 << 7 * width) - 1 else match.end() + width + value  # all bits set: not known


_SEGMENT = re.compile(rb"\x18\x53\x80\x67(?=[\x01-\xff])", re.DOTALL)
_CLUSTER = b"\x1f\x43\xb6\x75"
_FIRST_FRAME = 4096  # bytes in which the first frame of an MP3 lies


def _flac_head_end(data: Data, start: int) -> int:
    """Returns where the sound of a FLAC begins. The blocks in front may hold pictures, or the head of a WAV."""
    position, is_last = start + 4, False
    while not is_last and len(head := data[position : position + 4]) == 4:
        is_last = bool(head[0] & 0x80)
        position += 4 + int.from_bytes(head[1:], "big")
    return position


def _search_start_in_mp3(data: Data, start: int) -> int:
    """Returns the place in an MP3 from which the next recording is searched for.

    The place is behind the header Xing of the first frame, if there is one. `Beginnings` takes such a header for the
    beginning of a recording.
    """
    tag = XING.search(data, start, min(start + _FIRST_FRAME, len(data)))
    return tag.end() if tag else start + 2


def mp3_says_its_length(data: Data, part: Part) -> bool:
    """Returns whether the first frame of an MP3 says how many frames follow. FFmpeg estimates the length of others.

    FFmpeg does not believe a frame that says a much smaller size than the file has.
    """
    begin = id3_end(data, part.start)
    tag = XING.search(data, begin, min(begin + _FIRST_FRAME, part.end)) if begin < part.end else None
    if tag is None or tag.end() + 12 > part.end:
        return False
    has, _, size = struct.unpack(">III", data[tag.end() : tag.end() + 12])
    return bool(has & 1) and (not has & 2 or 16 * (part.end - tag.start()) <= 17 * size)
