"""A video is read as frame pairs, one per micro-turn: 100 ms before its start, and at its start."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from jaxtml.errors import InputError
from jaxtml.stream import video_file
from jaxtml.stream.images import image_patches
from jaxtml.stream.video_file import read_frame_pairs
from tests.stream.recordings import encode_track


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """One second of video at 20 frames per second. Frame i is grey of level 10 i."""
    path = tmp_path_factory.mktemp("video") / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.bit_rate = 96, 64, 4_000_000
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_pair_shows_100_ms_ago_and_now(video):
    pairs = read_frame_pairs(video, micro_turns=5, max_patches=6)
    assert len(pairs) == 5
    levels = [[frame.mean() for frame in pair] for pair in pairs]
    expected = [[0, 0], [20, 40], [60, 80], [100, 120], [140, 160]]
    np.testing.assert_allclose(levels, expected, atol=4)


def test_frames_are_scaled_until_their_patches_fit(video):
    (pair, *_) = read_frame_pairs(video, micro_turns=1, max_patches=2)
    assert pair.shape[0] == 2
    assert len(image_patches(pair)) <= 2
    assert pair.shape[2] > pair.shape[1], "the shape of the frame is kept"


def test_no_pairs_beyond_the_end_of_the_video(video):
    assert len(read_frame_pairs(video, micro_turns=50, max_patches=6)) == 6


def test_a_playlist_opens_no_other_file(video):
    for text in (f"ffconcat version 1.0\nfile {video.name}\n", f"#EXTM3U\n#EXTINF:5,\n{video.name}\n#EXT-X-ENDLIST\n"):
        playlist = video.with_name("list.mp4")
        playlist.write_text(text)
        with pytest.raises(InputError, match="is not a video"):
            read_frame_pairs(playlist, 3, 6)


def test_a_file_that_is_no_video_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="no video file"):
        read_frame_pairs(tmp_path / "absent.mp4", 3, 6)
    with pytest.raises(InputError, match="is not a video"):
        read_frame_pairs(tmp_path / "text.mp4", 3, 6)


def write_video(path: Path, frames: list[tuple[float, np.ndarray]], sound_s: float | None = None, **fields) -> Path:
    """Writes frames `(second, [H, W, 3])`, and a second of silence that begins at `sound_s`."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4" if "pixel" in fields else "ffv1", rate=100)
        stream.height, stream.width = frames[0][1].shape[:2]
        stream.pix_fmt = "yuv420p" if "pixel" in fields else "bgr0"  # FFV1 keeps levels exactly, and no pixel shape
        stream.codec_context.time_base = Fraction(1, 1000)
        if "rotation" in fields:
            stream.set_display_rotation(fields["rotation"], hflip=fields.get("hflip", False))
        if "pixel" in fields:
            stream.codec_context.sample_aspect_ratio = fields["pixel"]
        sound = None if sound_s is None else container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for second, picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * second), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            encode_track(container, sound, np.zeros(16000), 16000, offset=round(16000 * sound_s))
    return path


def grey(level: int, height: int = 32, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def corners() -> np.ndarray:
    """A picture, 32 x 64, whose quarters are grey of the levels 0, 80, 160 and 240."""
    return np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((16, 32), np.uint8))[..., None].repeat(3, -1)


@pytest.mark.parametrize(
    "turn, mirrored, quarters",
    [
        (0, False, [[0, 80], [160, 240]]),
        (90, False, [[80, 240], [0, 160]]),  # counter-clockwise
        (180, False, [[240, 160], [80, 0]]),
        (-90, False, [[160, 0], [240, 80]]),
        (0, True, [[80, 0], [240, 160]]),
    ],
)
def test_a_picture_is_turned_as_the_phone_was_held(tmp_path, turn, mirrored, quarters):
    path = write_video(tmp_path / "a.mkv", [(0, corners())], rotation=turn, hflip=mirrored)
    picture = read_frame_pairs(path, 1, 9)[0][1]
    assert (picture.shape[0] > picture.shape[1]) == (abs(turn) == 90)
    height, width = picture.shape[0] // 4, picture.shape[1] // 4
    found = [[int(picture[y * height, x * width, 0]) for x in (1, 3)] for y in (1, 3)]
    np.testing.assert_allclose(found, quarters, atol=3)


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = write_video(tmp_path / "a.mkv", [(0, grey(9, 32, 32))], pixel=Fraction(2, 1))
    assert read_frame_pairs(path, 1, 9)[0].shape == (2, 32, 64, 3)


def levels(path: Path, micro_turns: int) -> list[list[int] | None]:
    pairs = read_frame_pairs(path, micro_turns, 9)
    return [None if pair is None else [int(frame.mean()) for frame in pair] for pair in pairs]


def test_a_frame_is_shown_until_the_next_one_however_long_that_takes(tmp_path):
    frames = [(0, grey(10)), (0.05, grey(20)), (0.45, grey(30)), (0.5, grey(40)), (1.0, grey(50))]
    path = write_video(tmp_path / "a.mkv", frames)
    assert levels(path, 9) == [[10, 10], [20, 20], [20, 20], [40, 40], [40, 40], [40, 50], [50, 50]]


def test_time_begins_with_the_sound_of_the_video(tmp_path):
    frames = [(0.1 * i, grey(10 * i)) for i in range(10)]
    late_sound = write_video(tmp_path / "a.mkv", frames, sound_s=0.3)
    assert levels(late_sound, 3) == [[20, 30], [40, 50], [60, 70]]
    late_picture = write_video(tmp_path / "b.mkv", [(second + 0.5, picture) for second, picture in frames], sound_s=0.0)
    assert levels(late_picture, 5) == [None, None, None, [0, 10], [20, 30]]
    without_sound = write_video(tmp_path / "c.mkv", [(second + 7, picture) for second, picture in frames])
    assert levels(without_sound, 2) == [[0, 0], [10, 20]]


def test_a_truncated_video_is_shown_to_its_end_and_the_line_says_when_that_is(tmp_path, video, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(video_file.logging, "warning", lambda text, *values: lines.append(text % values))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    assert len(read_frame_pairs(tmp_path / "a.mp4", 10, 9)) == 10 and not lines
    assert 4 <= len(read_frame_pairs(tmp_path / "cut.mp4", 10, 9)) <= 7
    (line,) = lines
    assert "cut short or damaged: its pictures end at" in line and "of 2.0 s" in line


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "yuvj420p", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(9, 32, 32), format="rgb24")))
        container.mux(cover.encode())
        encode_track(container, sound, np.zeros(8000), 16000)
    with pytest.raises(InputError, match="holds no video, only a cover picture; give"):
        read_frame_pairs(tmp_path / "a.m4a", 3, 6)


def test_a_relative_name_with_a_colon_is_no_address_and_a_folder_is_named(video, tmp_path, monkeypatch):
    (tmp_path / "at 10:30.mp4").write_bytes(video.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read_frame_pairs("at 10:30.mp4", 3, 6)) == 3
    with pytest.raises(InputError, match="is a directory; give one video file"):
        read_frame_pairs(".", 3, 6)


def test_a_matroska_that_is_cut_short_is_reported(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(video_file.logging, "warning", lambda text, *values: lines.append(text % values))
    path = write_video(tmp_path / "a.mkv", [(i / 10, grey(i, 32, 32)) for i in range(30)])
    assert len(read_frame_pairs(path, 15, 6)) == 15 and not lines
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read_frame_pairs(path, 15, 6)
    (line,) = lines
    assert "cut short or damaged: its pictures end at" in line and "of 2.9 s" in line
