"""Joined, unfinished, truncated and odd recordings are heard as far as they go, and one line says what was wrong."""

from __future__ import annotations

import os
import struct
import threading

import av
import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.stream import audio_decoding, audio_file
from jaxtml.stream.audio_file import read_audio
from tests.stream.recordings import encode_track, encoded, from_phone, tone

NOISE = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)  # half a second at 16 kHz
SAMPLES = encoded(NOISE, 16000, "WAV")[44:]
ODD_CHUNK = struct.pack("<4sI5s", b"LIST", 5, b"abcde")
CHUNK = struct.pack("<4sI6s", b"LIST", 6, b"abcdef")


@pytest.fixture
def heard(tmp_path, monkeypatch):
    """`heard(bytes)` reads a file of these bytes. It returns the audio and the lines of the log."""
    lines: list[str] = []
    monkeypatch.setattr(audio_file.logging, "warning", lambda text, *values: lines.append(text % values))

    def read(content: bytes, name: str = "a.bin") -> tuple[np.ndarray, list[str]]:
        lines.clear()
        (tmp_path / name).write_bytes(content)
        return read_audio(tmp_path / name), list(lines)

    return read


def wav(size: int, riff: int = 0, before: bytes = b"", behind: bytes = b"", samples: bytes = SAMPLES) -> bytes:
    """Returns a mono 16-bit WAV at 16 kHz whose header says the length `size`."""
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    return head + before + struct.pack("<4sI", b"data", size) + samples + behind


UNFINISHED = {
    "zero": wav(0),
    "no length": wav(0xFFFFFFFF, 0xFFFFFFFF),
    "sox": wav(0x7FFFF000, 0x7FFFF024),
    "arecord": wav(0x80000000, 0x80000024),
    "unpadded chunk": wav(16000, before=ODD_CHUNK),
    "unpadded chunk, no length": wav(0, before=ODD_CHUNK),
    "chunk behind": wav(16000, 99, behind=CHUNK),
    "odd samples": wav(15999, samples=SAMPLES[:-1], behind=CHUNK),
    "tag behind": wav(16000, behind=b"TAG" + bytes(125)),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_a_wav_with_a_length_that_says_nothing_is_heard_whole(heard, case):
    audio, lines = heard(UNFINISHED[case])
    assert abs(len(audio) - 8000) <= 1 and not lines
    np.testing.assert_allclose(audio[:7999], NOISE[:7999], atol=4e-5)


def with_length(content: bytes, chunk: bytes, format: str, length: int, behind: int = 0) -> bytes:
    """Returns the file with another length in its chunk. The length is `behind` bytes behind the chunk's name."""
    at = content.index(chunk) + 4 + behind
    return content[:at] + struct.pack(format, length) + content[at + struct.calcsize(format) :]


# By container: the name behind which the length stands, its format, its distance in bytes from the name, a length that
# is too short, and one that is far too long.
OTHERS = {
    "WAV": (b"data", "<I", 0, 4000, 64000),
    "RF64": (b"ds64", "<Q", 12, 4000, 64000),
    "W64": (b"data", "<Q", 12, 4024, 64024),
    "AIFF": (b"SSND", ">I", 0, 4008, 64008),
    "CAF": (b"data", ">Q", 0, 4004, 64004),
    "AU": (b".snd", ">I", 4, 4000, 64000),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_length_that_is_wrong_is_reported_and_all_samples_are_heard(heard, kind):
    chunk, format, behind, short, long = OTHERS[kind]
    content = encoded(NOISE, 16000, kind)
    assert not heard(content)[1]
    for length, says in ((0, ""), (short, "promises 0.1 s, but 0.5 s are there"), (long, "it ends at 0.5 s")):
        audio, lines = heard(with_length(content, chunk, format, length, behind))
        np.testing.assert_allclose(audio, NOISE, atol=4e-5)
        assert len(lines) == bool(says) and all(says in line for line in lines)
    audio, (line,) = heard(content[: -len(content) // 2])
    assert 2900 < len(audio) < 4500 and "it ends at 0.2 s" in line and "promises 0.5 s" in line


def test_joined_files_are_all_heard(heard, tmp_path):
    a, b = tone(16000, 0.5), tone(48000, 0.5, 880)
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x64" + bytes(100)
    joined = {
        "WAV": encoded(a, 16000, "WAV") + encoded(b, 48000, "WAV"),
        "unfinished WAV": wav(0) + encoded(b, 48000, "WAV"),
        "AIFF": encoded(a, 16000, "AIFF") + encoded(b, 48000, "AIFF"),
        "FLAC": encoded(a, 16000, "FLAC") + encoded(b, 48000, "FLAC"),
        "OGG": encoded(a, 16000, "OGG") + encoded(b, 48000, "OGG"),
        "OGG of two codecs": encoded(a, 16000, "OGG", "OPUS") + encoded(np.stack([b, b], 1), 48000, "OGG"),
        "MP3": tag + encoded(a, 16000, "MP3") + tag + encoded(b, 48000, "MP3"),
        "M4A": from_phone(tmp_path / "m", "ipod", "alac", a, 16000)
        + from_phone(tmp_path / "m", "ipod", "alac", b, 48000),
        "WebM": 2 * from_phone(tmp_path / "m", "webm", "libopus", b, 48000),
    }
    for kind, content in joined.items():
        audio, (line,) = heard(content)
        assert len(audio) == pytest.approx(16000, abs=800), kind
        assert audio[9000:15000].std() == pytest.approx(0.21, abs=0.02), kind
        assert "holds 2 recordings, joined end to end" in line, kind


def a_recording_of_each_kind(folder) -> dict[str, bytes]:
    """Half a second of a tone each."""
    wave, phone = tone(16000, 0.5), tone(48000, 0.5)
    return {
        **{kind: encoded(wave, 16000, kind) for kind in ("WAV", "W64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3")},
        "Opus": encoded(wave, 16000, "OGG", "OPUS"),
        "FLAC in Ogg": from_phone(folder / "m", "ogg", "flac", wave, 16000),
        "FLAC in Matroska": from_phone(folder / "m", "matroska", "flac", wave, 16000),
        "M4A": from_phone(folder / "m", "ipod", "aac", phone, 48000),
        "WebM": from_phone(folder / "m", "webm", "libopus", phone, 48000),
        "AMR": from_phone(folder / "m", "amr", "libopencore_amrnb", tone(8000, 0.5), 8000),
        "AAC": from_phone(folder / "m", "adts", "aac", phone, 48000),
    }


def test_joined_files_of_any_two_kinds_are_all_heard(heard, tmp_path):
    kinds = a_recording_of_each_kind(tmp_path)
    # The beginning of an AAC file is looked for only where another file has ended.
    searched = {kind: content for kind, content in kinds.items() if kind != "AAC"}
    for first, content in searched.items():
        for second, joined in searched.items():
            audio, lines = heard(content + joined)
            assert len(audio) == pytest.approx(16000, abs=1200), (first, second)
            assert audio[10000:14000].std() == pytest.approx(0.21, abs=0.03), (first, second)
            assert "holds 2 recordings, joined end to end; all are heard" in lines[-1], (first, second)
    for first in ("WAV", "AIFF", "AU", "OGG", "M4A", "WebM"):
        assert len(heard(kinds[first] + kinds["AAC"])[0]) == pytest.approx(16000, abs=1200), first


def test_a_joined_file_that_is_not_heard_is_reported_with_its_place_and_its_size(heard, tmp_path):
    stream = from_phone(tmp_path / "m", "mpegts", "aac", tone(48000, 0.5), 48000)
    flac, wave = encoded(NOISE, 16000, "FLAC"), encoded(NOISE, 16000, "WAV")
    audio, (line,) = heard(stream + wave)
    assert len(audio) == pytest.approx(8000, abs=800)
    assert f"behind byte {len(stream):,}, and its {len(wave):,} bytes are not heard" in line
    audio, (line,) = heard(flac + stream)
    assert len(audio) == 8000 and "only its first 0.5 s are heard: at least" in line
    assert not heard(flac + b"TAG" + bytes(125))[1]


def test_a_head_inside_another_container_is_no_joined_file(heard, tmp_path):
    riff = encoded(NOISE, 16000, "WAV")[:44]  # `flac --keep-foreign-metadata` keeps the head of a WAV so
    flac = encoded(NOISE, 16000, "FLAC")
    block = b"\x02" + (4 + len(riff)).to_bytes(3, "big") + b"riff" + riff
    for content in (flac[:42] + block + flac[42:], a_recording_of_each_kind(tmp_path)["FLAC in Matroska"]):
        audio, lines = heard(content)
        assert len(audio) == pytest.approx(8000, abs=10) and not lines


ID3 = b"ID3\x03\x00\x00\x00\x00\x00\x64" + bytes(100)


def test_a_tag_in_front_of_any_recording_is_skipped_as_players_do(heard, tmp_path):
    for kind, content in a_recording_of_each_kind(tmp_path).items():
        for tags in (ID3, ID3 + ID3):
            audio, lines = heard(tags + content)
            assert len(audio) == pytest.approx(8000, abs=800) and not lines, kind
    audio, (line,) = heard(ID3 + wav(16000) + ID3 + encoded(NOISE, 16000, "FLAC"))
    assert len(audio) == 16000 and "holds 2 recordings" in line


@pytest.mark.parametrize(
    "front, name",
    [
        (b"\xef\xbb\xbf", "3 bytes (a UTF-8 byte order mark)"),
        (bytes(512), "512 bytes (zeros)"),
        (b"\r\n", "2 bytes (white space)"),
        (b"Content-Type: audio\r\n\r\n", "23 bytes (text)"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "19 bytes (the head of an HTTP response)"),
        (b"\x01\x80\xff", "3 bytes (no audio)"),
    ],
)
def test_what_is_in_front_of_a_recording_is_left_out_and_named(heard, front, name):
    for kind in ("WAV", "FLAC", "OGG", "AIFF", "CAF"):
        audio, (line,) = heard(front + encoded(NOISE, 16000, kind))
        assert len(audio) == 8000, kind
        assert f"its first {name} are left out: a recording begins behind them" in line, kind


ARCHIVES = [(b"PK\x03\x04" + bytes(30), "ZIP"), (bytes(257) + b"ustar" + bytes(250), "tar")]


@pytest.mark.parametrize("head, kind", ARCHIVES)
def test_an_archive_of_recordings_is_called_an_archive(heard, head, kind):
    with pytest.raises(InputError, match=f"is a {kind} archive, not a recording: unpack it"):
        heard(head + wav(16000))


def test_a_truncated_recording_is_heard_to_its_end_and_the_line_says_when_that_is(heard, tmp_path):
    webm = from_phone(tmp_path / "m", "webm", "libopus", tone(48000, 1.0), 48000)
    mp4 = from_phone(tmp_path / "m", "mp4", "aac", tone(48000, 1.0), 48000, movflags="faststart")
    noise = np.tile(NOISE, 3)
    cut = {
        "WebM": (webm[: len(webm) * 2 // 3], 0.7),
        "MP4": (mp4[: len(mp4) * 2 // 3], 0.6),
        "FLAC": (encoded(noise, 16000, "FLAC")[:30000], 1.0),
        "MP3": (encoded(noise, 16000, "MP3")[:4500], 1.0),
        "OGG": (encoded(noise, 16000, "OGG")[:8000], 0.9),
    }
    for kind, (content, seconds) in cut.items():
        audio, (line,) = heard(content)
        assert len(audio) / 16000 == pytest.approx(seconds, abs=0.2), kind
        assert f"ends at {len(audio) / 16000:.1f} s" in line, (kind, line)
    mp4 = from_phone(tmp_path / "m", "mp4", "aac", tone(48000, 0.3), 48000)
    with pytest.raises(InputError, match="cut short before its index"):
        heard(mp4[: len(mp4) - 300])


def flac_with_total(total: int) -> bytes:
    """Returns a FLAC of one second whose header says `total` samples. Programs that write to a pipe write 0 there."""
    content = encoded(np.tile(NOISE, 2), 16000, "FLAC")
    field = int.from_bytes(content[18:26], "big") >> 36 << 36 | total  # the lowest 36 bits are the number
    return content[:18] + field.to_bytes(8, "big") + content[26:]


def test_a_flac_with_a_length_that_is_wrong_is_heard_whole(heard):
    for total, says in ((16000, ""), (0, ""), (8000, ""), (32000, "promises 2.0 s")):
        audio, lines = heard(flac_with_total(total))
        np.testing.assert_allclose(audio, np.tile(NOISE, 2), atol=4e-5)
        assert len(lines) == bool(says) and all(says in line for line in lines)
    audio, (line,) = heard(2 * flac_with_total(0))
    assert len(audio) == 32000 and "holds 2 recordings" in line


def ogg_pages(content: bytes) -> list[bytes]:
    return [b"OggS" + page for page in content.split(b"OggS")[1:]]


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_lost_and_damaged_pages_of_an_ogg_are_reported_and_later_sound_stays_in_time(heard, codec):
    wave = np.concatenate([np.tile(NOISE, 10), tone(16000, 1.0)])
    pages = ogg_pages(encoded(wave, 16000, "OGG", codec))
    assert not heard(b"".join(pages))[1]
    middle = len(pages) // 2
    damaged = bytearray(pages[middle])
    damaged[-9] ^= 0xFF
    for page in (b"", bytes(damaged)):
        audio, (line,) = heard(b"".join([*pages[:middle], page, *pages[middle + 1 :]]))
        assert len(audio) == len(wave) and "without any data, are heard as silence" in line
        assert np.corrcoef(audio[81600:95000], wave[81600:95000])[0, 1] > 0.9
    _, (line,) = heard(b"".join([*pages[:2], *pages[3:]]))
    assert "is damaged: pieces of it are missing" in line


def test_a_cut_recording_does_not_swallow_the_one_joined_to_it(heard):
    whole = encoded(np.tile(NOISE, 8), 16000, "OGG")
    audio, (line, other) = heard(whole[: len(whole) * 3 // 4] + whole)
    assert 6.0 < len(audio) / 16000 < 7.5
    assert "has no end mark" in line and "holds 2 recordings, joined end to end; all are heard" in other


def test_a_joined_recording_that_cannot_be_read_is_reported(heard, tmp_path):
    mp4 = from_phone(tmp_path / "m", "mp4", "aac", tone(16000, 0.5), 16000)
    cut = mp4[:28] + struct.pack(">I4s4x", 12, b"mdat")  # an MP4 without its index
    for content in (mp4 + cut, cut + mp4):
        audio, lines = heard(content)
        assert len(audio) == pytest.approx(8000, abs=200)
        assert "cannot be read: was cut short before its index" in lines[0] and "the other 1 can be read" in lines[1]


def test_the_time_limit_holds_for_all_joined_recordings_together(heard, monkeypatch):
    for module in (audio_decoding, audio_file):
        monkeypatch.setattr(module, "MAX_HOURS", 0.0002)  # 0.72 s
    content = encoded(NOISE, 16000, "WAV")
    assert len(heard(content)[0]) == 8000
    with pytest.raises(InputError, match="longer than 0.0002 hours; cut it"):
        heard(content + content)


def test_tags_and_padding_of_an_mp3_are_no_damage_and_its_estimated_length_is_not_trusted(heard, tmp_path):
    plain = from_phone(tmp_path / "m", "mp3", "libmp3lame", tone(16000, 1.0), 16000, write_xing="0")
    assert plain.startswith(b"ID3")
    audio, (line,) = heard(plain + plain)
    assert len(audio) == pytest.approx(32000, abs=3000) and "holds 2 recordings, joined end to end" in line
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x64" + bytes(100)
    whole = encoded(np.tile(NOISE, 4), 16000, "MP3")
    assert len(heard(tag + tag + whole)[0]) == 32000
    _, lines = heard(whole + bytes(len(whole)))  # FFmpeg estimates 4 s then
    assert not any("promises" in line for line in lines)


def test_a_webm_with_pictures_and_an_mp4_in_fragments_are_reported_only_if_cut_short(heard, tmp_path):
    with av.open(str(tmp_path / "m"), "w", format="webm") as container:
        video = container.add_stream("libvpx", rate=10)
        video.width = video.height = 16
        sound = container.add_stream("libopus", rate=48000, layout="mono")
        for _ in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        encode_track(container, sound, tone(48000, 1.0), 48000)
        container.mux(video.encode())
    content = (tmp_path / "m").read_bytes()
    assert not heard(content)[1]
    _, (line,) = heard(content[: len(content) * 2 // 3])
    assert "has no end mark, so it may have been cut short: it ends at" in line
    options = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "200000"}
    mp4 = from_phone(tmp_path / "m", "mp4", "alac", NOISE, 16000, **options)
    assert not heard(mp4)[1] and not heard(mp4 + b"junk behind it")[1]
    assert len(heard(mp4[: len(mp4) * 2 // 3])[1]) == 1


@pytest.mark.parametrize("size", range(1, 13))
@pytest.mark.parametrize(
    "start", [b"\xff\xfb\x90", b"RIFF", b"OggS", b"ID3", b"fLaC", b".snd", b"\x1aE\xdf\xa3", b"\0\0\0\x18ftyp"]
)
def test_a_file_of_a_few_bytes_is_refused(heard, start, size):
    with pytest.raises(InputError, match="not audio|cut short before"):
        heard((start + bytes(12))[:size])


PHONES = {
    "m4a": ("ipod", "aac", 44100),
    "mov": ("mov", "pcm_s16le", 48000),
    "webm": ("webm", "libopus", 48000),
    "3gp": ("3gp", "libopencore_amrnb", 8000),
    "amr": ("amr", "libopencore_amrnb", 8000),
    "aac": ("adts", "aac", 44100),
    "caf": ("caf", "pcm_s16be", 44100),
    "ts": ("mpegts", "aac", 48000),
}


@pytest.mark.parametrize("ending", PHONES)
def test_the_files_of_phones_and_browsers_are_heard(heard, tmp_path, ending):
    format, codec, rate = PHONES[ending]
    audio, lines = heard(from_phone(tmp_path / "m", format, codec, tone(rate, 0.6), rate), f"a.{ending}")
    assert 9600 <= len(audio) < 9600 + 1600 and not lines
    assert audio[1600:8000].std() == pytest.approx(0.21, abs=0.03)


def test_a_pause_without_packets_is_heard_as_silence(heard, tmp_path):
    with av.open(str(tmp_path / "m"), "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48000)
        stream.layout = "mono"
        for start in (0, 48000):
            frame = av.AudioFrame.from_ndarray(tone(48000, 0.3)[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    audio, (line,) = heard((tmp_path / "m").read_bytes())
    assert len(audio) == pytest.approx(1.3 * 16000, abs=500)
    assert not audio[6000:15000].any() and audio[17500:20000].std() > 0.15
    assert "without any data, are heard as silence" in line


def test_the_default_track_is_heard_and_named(heard, tmp_path):
    with av.open(str(tmp_path / "m"), "w", format="matroska") as container:
        tracks = [container.add_stream("pcm_s16le", rate=16000) for _ in range(2)]
        for track, language in zip(tracks, ("deu", "eng"), strict=True):
            track.layout, track.metadata["language"] = "mono", language
        tracks[0].disposition = av.stream.Disposition(0)
        tracks[1].disposition = av.stream.Disposition.default
        encode_track(container, tracks[0], np.zeros(8000), 16000)
        encode_track(container, tracks[1], NOISE, 16000)
    audio, (line,) = heard((tmp_path / "m").read_bytes())
    np.testing.assert_allclose(audio, NOISE, atol=1e-4)
    assert "has 2 audio tracks; track 2 (eng) is heard" in line


def test_a_file_without_sound_is_refused(heard, tmp_path):
    with av.open(str(tmp_path / "m"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(InputError, match="holds pictures without any sound; give"):
        heard((tmp_path / "m").read_bytes())


def test_a_wav_of_64_bit_integers_is_refused(heard):
    content = bytearray(encoded(NOISE, 16000, "WAV", "DOUBLE"))
    content[20] = 1  # PCM instead of float
    with pytest.raises(InputError, match="not audio .*samples of the kind s64"):
        heard(bytes(content))


def test_a_playlist_opens_no_other_file(heard, tmp_path):
    (tmp_path / "b.wav").write_bytes(encoded(NOISE, 16000, "WAV"))
    for text in ("ffconcat version 1.0\nfile b.wav\n", f"#EXTM3U\n#EXTINF:5,\n{tmp_path}/b.wav\n#EXT-X-ENDLIST\n"):
        with pytest.raises(InputError, match="not audio"):
            heard(text.encode())


def stereo(left: np.ndarray, right: np.ndarray) -> bytes:
    return encoded(np.stack([left, right], axis=1), 16000, "WAV", "FLOAT")


def test_channels_that_cancel_each_other_are_heard_alone(heard):
    voice = np.concatenate([NOISE, NOISE])
    half = np.concatenate([NOISE, -0.9 * NOISE])
    for right in (-voice, half, -0.8 * voice):
        audio, (line,) = heard(stereo(voice, right))
        np.testing.assert_allclose(audio, voice, atol=1e-6)
        assert "its channels cancel each other" in line and "channel 1 is heard alone" in line
    audio, lines = heard(stereo(voice, 0 * voice))
    np.testing.assert_allclose(audio, voice / 2, atol=1e-6)
    assert not lines


def test_no_speaker_is_dropped_because_a_short_stretch_cancels(heard):
    silence = 0 * NOISE
    left = np.concatenate([NOISE, NOISE, silence, silence, NOISE])
    right = np.concatenate([silence, silence, NOISE, NOISE, -NOISE])
    audio, (line,) = heard(stereo(left, right))
    np.testing.assert_allclose(audio, (left + right) / 2, atol=1e-6)
    assert "its channels cancel each other in 0.5 s, which are lost; no channel alone has all of the sound" in line


@pytest.mark.parametrize(
    "wave, says",
    [
        (NOISE * 0.005, "very quiet: its loudest 200 ms are at -66 dBFS"),
        (NOISE * 0, "digital silence: every sample is 0 (-inf dBFS)"),
        (np.clip(NOISE * 20, -1, 1), "of its samples are clipped at full scale (0 dBFS)"),
        (NOISE + 0.4, "constant offset (DC) of +0.40 of full scale; without it the loudest 200 ms are at -20 dBFS"),
        (NOISE * 0.1, ""),
        (np.clip(NOISE * 3, -1, 1), ""),
    ],
)
def test_a_level_that_is_hard_to_hear_is_reported_and_nothing_is_changed(heard, wave, says):
    audio, lines = heard(encoded(wave, 16000, "WAV", "FLOAT"))
    np.testing.assert_array_equal(audio, wave.astype(np.float32))
    assert len(lines) == bool(says) and all(says in line for line in lines)


def test_a_pipe_is_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(encoded(NOISE, 16000, "FLAC")))
    writer.start()
    audio = read_audio(tmp_path / "pipe")
    writer.join()
    np.testing.assert_allclose(audio, NOISE, atol=4e-5)


def test_standard_input_is_read_and_named(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(from_phone(tmp_path / "m", "ipod", "alac", NOISE, 16000))
    with open(tmp_path / "a") as file:
        monkeypatch.setattr("sys.stdin", file)
        np.testing.assert_allclose(read_audio("-"), NOISE, atol=4e-5)
    (tmp_path / "a").write_bytes(b"")
    with open(tmp_path / "a") as file, pytest.raises(InputError, match="standard input: is empty"):
        monkeypatch.setattr("sys.stdin", file)
        read_audio("-")
