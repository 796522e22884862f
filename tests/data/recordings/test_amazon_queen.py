"""The dialogues of the game are read as lines of a person, with the times of their words."""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxtml.data import bank_plan
from jaxtml.data.recordings import alignment, amazon_queen
from jaxtml.data.voices import espeak, registry
from jaxtml.errors import InputError


def text_bytes(text: str, at: int, align_to: int) -> bytes:
    data = bytes([len(text)]) + text.encode("latin1")
    return data + bytes(-(at + len(data)) % align_to) if text else data


def dialogue(joe: list[tuple[int, str]], other: list[tuple[int, str]]) -> bytes:
    """Returns a dialogue of one level, as `AND1.DOG` is written."""
    data, places = bytearray(32 + 96), []
    for lines in (joe, other):
        places.append(len(data))
        for number, text in lines:
            data += struct.pack(">HH", 0, number)
            data += text_bytes(text, len(data), 4)
    again = len(data)
    for text in ("Hello again.*03", ""):
        data += text_bytes(text, len(data), 2)
    struct.pack_into(">hhhhh", data, 0, 1, 0, 2, len(joe), len(other))
    struct.pack_into(">HHH", data, 22, places[1], 0, again)
    return bytes(20) + bytes(data)


def recording(text: str) -> bytes:
    """Returns MP3 at 11,025 Hz of a text, spoken by eSpeak."""
    try:
        said = espeak.render(text, "en+m3", 1.0, 1.0)
    except InputError as error:
        pytest.skip(str(error))
    import soxr

    buffer = io.BytesIO()
    soundfile.write(buffer, soxr.resample(said.wave, said.rate_hz, 11_025), 11_025, format="MP3")
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    files = {
        "AND1.DOG": dialogue(
            [(0, "0"), (6, 'At least I have a fish.*15And a "horse".*XY00(237,112)*03'), (7, "It costs 50 dollars.")],
            [(6, "What is it that you like?*02"), (9, "Never recorded.")],
        ),
        "020006J1.SB": recording("At least I have a fish"),
        "020006J2.SB": recording("And a horse"),
        "020007J1.SB": recording("It costs fifty dollars"),
        "020006P1.SB": recording("What is it that you like"),
        "02XXXXP1.SB": recording("Hello again and again and again, this is not the text, by far not the text at all"),
    }
    table, body, offset = b"", b"", 15 + 21 * len(files)
    for name, data in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, offset + len(body), len(data))
        body += data
    data = b"QTBLCEM10\0\0\0\1" + struct.pack(">H", len(files)) + table + body
    path = tmp_path / "queen.1c"
    path.write_bytes(data)
    monkeypatch.setattr(amazon_queen, "ARCHIVE", path)
    monkeypatch.setattr(amazon_queen, "SHA256", hashlib.sha256(data).hexdigest())
    caches = (amazon_queen.lines, amazon_queen._by_text, amazon_queen._Archive.open)
    for cached in caches:
        cached.cache_clear()
    yield path
    for cached in caches:
        cached.cache_clear()


def test_lines_have_their_speaker_and_exact_text_and_only_those_with_a_fitting_sound(archive):
    assert [(line.voice, line.text, line.file) for line in amazon_queen.lines()] == [
        ("human:joe", "At least I have a fish.", "020006J1.SB"),
        ("human:joe", "And a horse .", "020006J2.SB"),
        ("human:and", "What is it that you like?", "020006P1.SB"),
    ]


def test_a_line_is_spoken_with_the_times_of_its_words(archive):
    said = amazon_queen.speak("human:and", "What is it that you like?")
    assert [word.text for word in said.words] == ["what", "is", "it", "that", "you", "like"]
    edges = [edge for word in said.words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges) and edges[-1] == pytest.approx(len(said.wave) / 16_000, abs=0.01)


def test_another_version_and_an_unknown_line_are_refused_in_one_line(archive, monkeypatch):
    with pytest.raises(InputError, match="has no recording"):
        amazon_queen.speak("human:and", "Never recorded.")
    amazon_queen._Archive.open.cache_clear()
    monkeypatch.setattr(amazon_queen, "SHA256", "0" * 64)
    with pytest.raises(InputError, match="not the file of version 1.0.0-9"):
        amazon_queen.speak("human:joe", "And a horse .")


def test_a_plan_keeps_the_lines_of_a_bank_where_the_recordings_are_not_installed(archive, monkeypatch):
    planned = [line for shard in bank_plan.plan_lines() for line in shard]
    assert {(line.voice, line.split, line.role) for line in planned} == {
        ("human:joe", "train", "line"), ("human:and", "train", "line"),
    }  # fmt: skip
    monkeypatch.setattr(amazon_queen, "is_installed", lambda: False)
    assert [line for shard in bank_plan.plan_lines(planned) for line in shard] == planned
    assert bank_plan.plan_lines() == ()


def test_no_person_is_in_both_splits_and_ten_are_held_out():
    assert not set(registry.HUMAN_TRAIN) & set(registry.HUMAN_TEST)
    assert len(registry.HUMAN_TEST) >= 10


def test_alignment_finds_the_words_of_another_voice():
    text = "the old captain never told anybody where his ship was hidden"
    try:
        said = espeak.render(text, "gmw/en-GB-scotland+m5", 0.85, 0.9)
    except InputError as error:
        pytest.skip(str(error))
    starts_s = alignment.align(said.wave, said.rate_hz, text)
    errors_ms = 1000 * np.abs(np.array(starts_s) - np.array(said.starts_s))
    assert np.median(errors_ms) < 40 and errors_ms.max() < 150
