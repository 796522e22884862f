"""A video is read as frame pairs, one per micro-turn: 100 ms before its start, and at its start."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.stream.images import image_patches
from jaxtml.stream.video_file import read_frame_pairs


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


def test_a_file_that_is_no_video_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="no video file"):
        read_frame_pairs(tmp_path / "absent.mp4", 3, 6)
    with pytest.raises(InputError, match="is not a video"):
        read_frame_pairs(tmp_path / "text.mp4", 3, 6)
