"""Recordings are read and written in all formats and rates, and each kind of damage has its own error message."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxtml.errors import InputError
from jaxtml.stream import audio_decoding
from jaxtml.stream.audio_file import AUDIO_ENDINGS, read_audio, write_audio, write_wav


def tone(rate: int, seconds: float = 2.0, hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def difference_in_the_middle(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest difference. A tenth of a second at both ends is left out, where resampling filters ring."""
    length = min(len(a), len(b))
    return float(np.abs(a[1600 : length - 1600] - b[1600 : length - 1600]).max())


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("format", ["wav", "flac"])
def test_any_rate_is_read_as_16_khz_on_the_same_clock(tmp_path: Path, rate: int, format: str):
    soundfile.write(tmp_path / f"a.{format}", tone(rate), rate)
    audio = read_audio(tmp_path / f"a.{format}")
    assert audio.dtype == np.float32 and audio.shape == (32000,)
    assert difference_in_the_middle(audio, tone(16000)) < 2e-4


def test_a_48_khz_stereo_mp3_is_read(tmp_path: Path):
    stereo = np.stack([tone(48000), 0.5 * tone(48000)], axis=1)
    soundfile.write(tmp_path / "a.mp3", stereo, 48000)
    audio = read_audio(tmp_path / "a.mp3")
    assert abs(len(audio) - 32000) <= 1
    assert difference_in_the_middle(audio, 0.75 * tone(16000)) < 0.02


def test_an_ogg_is_read(tmp_path: Path):
    soundfile.write(tmp_path / "a.ogg", tone(16000), 16000)
    assert difference_in_the_middle(read_audio(tmp_path / "a.ogg"), tone(16000)) < 0.02


def test_channels_are_averaged(tmp_path: Path):
    six = np.stack([tone(16000) * scale for scale in (1, 0, 0, 0, 0, -0.4)], axis=1)
    soundfile.write(tmp_path / "a.wav", six, 16000, subtype="FLOAT")
    assert np.allclose(read_audio(tmp_path / "a.wav"), 0.1 * tone(16000), atol=1e-7)


def test_reading_in_blocks_equals_reading_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    soundfile.write(tmp_path / "a.wav", tone(44100, 3.3), 44100)
    at_once = read_audio(tmp_path / "a.wav")
    monkeypatch.setattr(audio_decoding, "BLOCK_SECONDS", 1)
    assert np.allclose(read_audio(tmp_path / "a.wav"), at_once, atol=1e-6)


@pytest.mark.parametrize("shape", [(5000,), (5000, 1), (5000, 2)])
def test_16_bit_audio_survives_writing_and_reading_exactly(tmp_path: Path, shape: tuple[int, ...]):
    wave = np.random.default_rng(0).integers(-32768, 32768, shape).astype(np.float32) / 32768
    write_wav(tmp_path / "a.wav", wave)
    back, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 16000 and soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert np.array_equal(back, wave.squeeze())


def test_too_loud_audio_is_clipped_not_wrapped(tmp_path: Path):
    write_wav(tmp_path / "a.wav", np.array([1.5, -1.5, 1.0], np.float32))
    assert np.allclose(read_audio(tmp_path / "a.wav"), [1, -1, 1], atol=1e-4)


def test_writing_replaces_an_older_file_and_leaves_nothing_else_behind(tmp_path: Path):
    write_wav(tmp_path / "a.wav", tone(16000))
    write_wav(tmp_path / "a.wav", tone(16000, 0.5))
    assert len(read_audio(tmp_path / "a.wav")) == 8000
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_a_disk_that_fills_up_leaves_the_older_file_intact(tmp_path: Path):
    write_wav(tmp_path / "a.wav", tone(16000, 0.1))
    before = (tmp_path / "a.wav").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            write_wav(tmp_path / "a.wav", tone(16000, 5.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_and_a_device_is_not_replaced():
    with pytest.raises(InputError, match="no space left"):
        write_wav("/dev/full", tone(16000))
    assert Path("/dev/full").is_char_device()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    for place in (tmp_path / "missing" / "a.wav", tmp_path):
        with pytest.raises(InputError, match="cannot be written"):
            write_wav(place, tone(16000))


@pytest.mark.parametrize("ending", ["", *AUDIO_ENDINGS, ".FLAC"])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_name_of_a_file_decides_its_format_and_no_format_moves_the_sound(
    tmp_path: Path, ending: str, channels: int
):
    silence_first = np.concatenate([np.zeros(3200, np.float32), tone(16000, 1.234)])
    wave = silence_first if channels == 1 else np.stack([silence_first, silence_first / 2], axis=1)
    path = tmp_path / f"a{ending}"
    write_audio(path, wave)
    assert soundfile.info(path).format == (ending[1:].upper() or "WAV")
    back, rate = soundfile.read(path, dtype="float32")
    assert rate == 16000 and back.shape == wave.shape
    assert np.abs(back[:3000]).max() < 0.02 and np.abs(back - wave)[3400:-400].max() < 0.03


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.txt", "a.wav.gz"])
def test_a_name_that_promises_another_format_is_refused(tmp_path: Path, name: str):
    for write in (write_audio, write_wav):
        with pytest.raises(InputError, match="cannot be written as .*; let its name end in .wav, .flac, .ogg"):
            write(tmp_path / name, tone(16000))
    with pytest.raises(InputError, match="this writes WAV; let the name end in .wav"):
        write_wav(tmp_path / "a.flac", tone(16000))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_dot_in_its_name_is_called_a_folder(tmp_path: Path):
    (tmp_path / "tmp.loys8").mkdir()
    with pytest.raises(InputError, match="tmp.loys8: cannot be written, because it is a folder; name a file"):
        write_audio(tmp_path / "tmp.loys8", tone(16000))


@pytest.mark.parametrize(
    "wave, rate, says",
    [
        (np.zeros(9, np.int16), 16000, "floats in .* got int16; divide 16-bit samples by 32768.0"),
        (np.full(9, 12000.0), 16000, "reaches 12000 where full scale is 1"),
        (np.zeros(9), 0, "the rate is 0; give"),
        (np.zeros(9), 0.5, "the rate is 0.5; give"),
    ],
)
def test_what_would_be_written_as_noise_is_refused(tmp_path: Path, wave: np.ndarray, rate: float, says: str):
    with pytest.raises(ValueError, match=says):
        write_wav(tmp_path / "a.wav", wave, rate)
    assert list(tmp_path.iterdir()) == []


def test_audio_with_nan_is_never_written(tmp_path: Path):
    with pytest.raises(ValueError, match="NaN"):
        write_wav(tmp_path / "a.wav", np.array([0.0, np.nan], np.float32))
    assert list(tmp_path.iterdir()) == []


def _wav_header_claiming(frames: int) -> bytes:
    """Returns a mono 16-bit 16 kHz WAV header for that many frames. No frames follow it."""
    size = 2 * frames
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
        + struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
        + struct.pack("<4sI", b"data", size)
    )


def _broken_files(folder: Path) -> list[tuple[Path, str]]:
    """Writes broken files. Returns `(file, a part of the message)` for each."""
    nan = np.full(8 * 16000, np.nan, np.float32)
    late_inf = np.append(tone(16000), np.float32(np.inf))
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", late_inf, 16000, subtype="FLOAT")
    soundfile.write(folder / "integers.wav", tone(16000) * 32768, 16000, subtype="FLOAT")
    soundfile.write(folder / "silent_header.wav", np.empty(0, np.float32), 16000)
    (folder / "claims.wav").write_bytes(_wav_header_claiming(16000))
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio\n" * 100)
    (folder / "speech.raw").write_bytes(bytes(3200))
    soundfile.write(folder / "whole.flac", tone(16000), 16000)
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:30])
    (folder / "half.flac").write_bytes((folder / "whole.flac").read_bytes()[:2000])
    return [
        (folder / "nan.wav", "NaN"),
        (folder / "inf.wav", "NaN or infinite"),
        (folder / "integers.wav", "full scale"),
        (folder / "silent_header.wav", "zero samples"),
        (folder / "claims.wav", "zero samples"),
        (folder / "empty.wav", "empty"),
        (folder / "text.wav", "not audio"),
        (folder / "speech.raw", "without a header"),
        (folder / "cut.flac", "not audio"),
        (folder / "half.flac", "damaged"),
        (folder / "nowhere.wav", "no such file"),
        (folder / "a\0b.wav", "cannot be opened"),
        (folder, "directory"),
    ]


def test_each_way_a_recording_can_be_wrong_is_one_clear_line(tmp_path: Path):
    for path, says in _broken_files(tmp_path):
        with pytest.raises(InputError, match=says) as caught:
            read_audio(path)
        message = str(caught.value)
        assert "\n" not in message and path.name in message and ";" in message, message


def test_a_recording_of_many_hours_is_refused_before_it_is_read(tmp_path: Path):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 1000, 1, "PCM_U8") as file:
        for _ in range(5):
            file.write(np.zeros(3_600_000, np.int16))
    with pytest.raises(InputError, match="longer than 4 hours"):
        read_audio(tmp_path / "long.wav")
