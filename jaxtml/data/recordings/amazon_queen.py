"""The spoken dialogues of the game "Flight of the Amazon Queen" (1995): people with exact text.

Debian's package `flight-of-the-amazon-queen` 1.0.0-9 has one archive, `queen.1c`. It holds about four thousand lines of
30 characters, three hours, as MP3 at 11 kHz, and the dialogues as text. The licence allows to distribute the game
unchanged or marked as modified, with its notices, and not to sell it alone (/usr/share/doc/flight-of-the-amazon-queen).
We read it when data is built and commit nothing of it: do not publish sound that is made from it. Some actors play
several characters.

The layout of the archive and of the dialogues is the one that ScummVM's engine "queen" reads. A dialogue (`.DOG`) has
the lines of Joe, the hero, and of one other character. A line is a list of segments, each with a stage direction
after it ("Hello.*03"). The sound of a segment is the file `<dialogue><id><J or P><segment>.SB`.

Called by `jaxtml.data.bank_plan` (which lines there are) and `jaxtml.data.bank` (their sound).

Axis glossary: N samples.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import soundfile

from jaxtml.data.recordings.alignment import align
from jaxtml.data.voices.utterance import Rendering, Utterance, finish, words_of
from jaxtml.errors import InputError
from jaxtml.user_cache import cache_folder

ARCHIVE = Path("/usr/share/scummvm/flight-of-the-amazon-queen/queen.1c")
SHA256 = "cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67"
INSTALL = "run tools/install_voices in the clone of jaxtml, or apt-get install flight-of-the-amazon-queen"
ENGINE = "human"
"""Voices are named `human:CHARACTER`, as `human:bob`. `jaxtml.data.voices.registry` has their split."""

_DOG_HEADER = 20  # bytes before a dialogue
_MIN_S, _MAX_S = 0.4, 12.0
_LETTERS_PER_S = (4.0, 28.0)  # outside these bounds the sound is not the text: a laugh, a scream, a missing piece


@dataclass(frozen=True)
class Line:
    """One recorded line.

    Attributes:
      voice: `human:CHARACTER`.
      text: what is said, with its punctuation.
      file: name of the sound in the archive.
    """

    voice: str
    text: str
    file: str


def is_installed() -> bool:
    """Returns whether the archive is there: where Debian's package puts it, or where `tools/install_voices` does."""
    return _path().is_file()


def _path() -> Path:
    cache = cache_folder()
    return ARCHIVE if ARCHIVE.is_file() or cache is None else cache / ARCHIVE.name


@cache
def lines() -> tuple[Line, ...]:
    """Returns every line that has a sound and whose text can be spoken, in the order of the archive's files.

    A character who says the same text twice is listed with the first of the two.

    Raises:
      InputError: the package is not installed, or is another version.
    """
    archive = _Archive.open()
    found: dict[tuple[str, str], Line] = {}
    for name in sorted(archive.entries):
        if name.endswith(".DOG"):
            for line in _dialogue(archive, name):
                if line.file in archive.entries and (line.voice, line.text) not in found and _fits(archive, line):
                    found[line.voice, line.text] = line
    return tuple(found.values())


def speak(voice: str, text: str) -> Utterance:
    """Returns the recording of a line, at 16 kHz, trimmed, with the times of its words.

    Raises:
      InputError: the package is not installed, or has no such line.
      ValueError: the recording has no sound.
    """
    line = _by_text().get((voice, text))
    if line is None:
        raise InputError(f"{voice} has no recording of {text!r} in {_path()}: {INSTALL}")
    wave, rate_hz = soundfile.read(io.BytesIO(_Archive.open().read(line.file)), dtype="float32")
    starts_s = align(wave, rate_hz, text)
    return finish(Rendering(wave, rate_hz, starts_s), voice, text)


@cache
def _by_text() -> dict[tuple[str, str], Line]:
    return {(line.voice, line.text): line for line in lines()}


@dataclass(frozen=True)
class _Archive:
    """The open archive and its table: file name -> (offset, size)."""

    data: mmap.mmap
    entries: dict[str, tuple[int, int]]

    @staticmethod
    @cache
    def open() -> _Archive:
        if not is_installed():
            raise InputError(f"the recordings are not in {ARCHIVE}: {INSTALL}")
        with _path().open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if data[:4] != b"QTBL" or hashlib.sha256(data).hexdigest() != SHA256:
            raise InputError(f"{_path()} is not the file of version 1.0.0-9: {INSTALL}")
        (count,) = struct.unpack_from(">H", data, 13)
        entries = {}
        for index in range(count):
            name, _, offset, size = struct.unpack_from(">12sBII", data, 15 + 21 * index)
            entries[name.rstrip(b"\0").decode("latin1")] = (offset, size)
        return _Archive(data, entries)

    def read(self, name: str) -> bytes:
        offset, size = self.entries[name]
        return self.data[offset : offset + size]


def _dialogue(archive: _Archive, name: str) -> Iterator[Line]:
    """Yields the segments of a dialogue, whether or not they have a sound."""
    data = archive.read(name)[_DOG_HEADER:]
    levels, _, key, joe_count, other_count = struct.unpack_from(">hhhhh", data)
    other_at, _, again_at = struct.unpack_from(">HHH", data, 22)
    other = re.sub(r"\d+$", "", name.removesuffix(".DOG")).lower()
    spoken: list[tuple[str, str, str]] = []  # (J or P, id, text)
    for who, at, count in (("J", 32 + abs(levels) * 96, joe_count), ("P", other_at, other_count)):
        for index in range(count):
            (number,) = struct.unpack_from(">H", data, at + 2)
            text, at = _string(data, at + 4, 4)
            opens = who == "J" and index == 0  # Joe's first line has a name of its own
            spoken.append((who, "SSSS" if opens else f"{number:4X}".replace(" ", "0"), text))
    for who in ("P", "J"):  # what the two say if they have talked before
        text, again_at = _string(data, again_at, 2)
        spoken.append((who, "XXXX", text))
    for who, number, text in spoken:
        voice = f"{ENGINE}:{'joe' if who == 'J' else other}"
        for index, segment in enumerate(_segments(text), 1):
            said = " ".join(re.sub(r'["()~]', " ", segment).split())
            yield Line(voice, said, f"{key:02d}{number}{who}{index:X}.SB")


def _string(data: bytes, at: int, align_to: int) -> tuple[str, int]:
    """Reads a string at `at`. Returns it and the aligned place behind it."""
    length = data[at]
    text = data[at + 1 : at + 1 + length].decode("latin1")
    return text, (at + length + align_to) & -align_to if length else at + 1


def _segments(text: str) -> Iterator[str]:
    """Yields the segments of a line. Each but the last ends with a stage direction: `*` and two letters or digits.

    The direction `*XY00(237,112)` is longer.
    """
    start = at = 0
    while at < len(text):
        if text[at] == "*":
            yield text[start:at]
            at += 14 if text[at + 1 : at + 3] == "XY" else 3
            start = at
        else:
            at += 1
    if start < len(text):
        yield text[start:]


def _fits(archive: _Archive, line: Line) -> bool:
    """Returns whether the text can be read as words, and the sound is about as long as the text."""
    try:
        letters = sum(map(len, words_of(line.text)))
    except InputError:
        return False
    seconds = soundfile.info(io.BytesIO(archive.read(line.file))).duration
    low, high = _LETTERS_PER_S
    return _MIN_S <= seconds <= _MAX_S and low <= letters / seconds <= high
