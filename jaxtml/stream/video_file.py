"""Reads a video file as frame pairs, one per micro-turn (200 ms): what the camera showed 100 ms before, and shows now.

Called by `converse --video`. PyAV decodes. Pictures are as a player shows them: turned as the phone was held, and with
square pixels.

Axes: H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from jaxtml.errors import InputError
from jaxtml.stream.images import fitted_size
from jaxtml.stream.timebase import MICRO_TURN_MS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_DURATION = re.compile(r"(\d+):(\d+):([\d.]+)")
_STEP_S = MICRO_TURN_MS / 2000  # the two pictures of a pair are half a micro-turn apart
_ROUNDING_S = 0.001  # containers round times to a millisecond
_MISSING_S = 0.5  # a video that is shorter than its header says by more than this was cut short


def check_video(path: str | Path) -> None:
    """Raises `InputError` if there is no such file, or it holds no video."""
    with _opened(path):
        pass


def read_frame_pairs(path: str | Path, micro_turns: int, max_patches: int) -> list[np.ndarray | None]:
    """Returns `[2, H, W, 3]` uint8 for each micro-turn up to the end of the video, None before its first frame.

    The two frames are those that are shown 100 ms before the start of the micro-turn, and at its start. The first
    micro-turn starts with the first sample of the video's own sound. A video without sound starts with its first frame.
    A line in the log says where a damaged video ends.

    Args:
      path: the video file.
      micro_turns: length of the session; later frames are not read.
      max_patches: frames are scaled down, keeping their aspect ratio, until their grid has at most this many patches.

    Raises:
      InputError: there is no such file, it holds no video, or its frames do not fit into `max_patches` at any size.
    """
    shown: list[np.ndarray | None] = []  # what is shown at -100 ms, 0 ms, 100 ms, ...
    last = 2 * micro_turns
    with _opened(path) as (container, stream):
        reader = _Frames(container, stream, max_patches)
        picture: _Picture | None = None
        for frame in reader.frames():
            while len(shown) < last and (len(shown) - 1) * _STEP_S < frame.start_s - _ROUNDING_S:
                shown.append(_array(picture, path))
            picture = frame
            if len(shown) >= last:
                break
        if picture is None:
            raise InputError(f"{path} holds no frame of video")
        while len(shown) < last and (len(shown) - 1) * _STEP_S <= picture.end_s + _ROUNDING_S:
            shown.append(_array(picture, path))
        if note := reader.note(picture.end_s if len(shown) < last else None):
            logging.warning("%s: %s", path, note)
    return [_pair(earlier, now) for earlier, now in zip(shown[::2], shown[1::2], strict=False)]


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Yields the file and its track of video: the default one, else the first. A cover picture is no video."""
    import av
    from av.error import FFmpegError
    from av.stream import Disposition

    if not Path(path).is_file():
        if Path(path).is_dir():
            raise InputError(f"{path} is a directory; give one video file")
        if Path(path).exists() or str(path) == "-":
            raise InputError(f"{path} is no video file: a video cannot come through a pipe; save it to a file first")
        raise InputError(f"no video file {path}: give the path of a video")
    with ExitStack() as stack:
        file = stack.enter_context(Path(path).open("rb"))
        try:
            # A playlist would make FFmpeg open other files and addresses, so no protocol is allowed. FFmpeg reads the
            # opened file itself without a protocol.
            container = av.open(file, "r", metadata_errors="replace", options={"protocol_whitelist": "none"})
        except FFmpegError as error:
            raise InputError(f"{path} is not a video that can be read: {error.strerror or error}") from error
        stack.enter_context(container)
        tracks = container.streams.video
        moving = [track for track in tracks if not track.disposition & Disposition.attached_pic]
        if not moving:
            cover = ", only a cover picture" if tracks else ""
            raise InputError(f"{path} holds no video{cover}; give a file with a video track")
        default = (track for track in moving if track.disposition & Disposition.default)
        yield container, next(default, moving[0])


def _array(picture: _Picture | None, path: str | Path) -> np.ndarray | None:
    try:
        return None if picture is None else picture.array()
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _pair(earlier: np.ndarray | None, now: np.ndarray | None) -> np.ndarray | None:
    """Returns `[2, H, W, 3]`. Where the earlier picture is missing or has another size, the present one is used."""
    if now is None:
        return None
    return np.stack([now if earlier is None or earlier.shape != now.shape else earlier, now])


class _Frames:
    """The frames of a video, in the order in which they are shown."""

    def __init__(self, container: InputContainer, stream: VideoStream, max_patches: int):
        self._container, self._stream, self._max_patches = container, stream, max_patches
        self._damaged = 0
        self._origin_s = _start_s(next(iter(container.streams.audio), stream))

    def frames(self) -> Iterator[_Picture]:
        """Yields the frames with their times. Damaged ones are left out."""
        from av.error import FFmpegError

        time_s = 0.0
        packets = iter(self._container.demux(self._stream))
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except FFmpegError:
                self._damaged += 1
                continue
            if packet is None:
                return
            for frame in frames:
                time_s = time_s if frame.time is None else frame.time - self._origin_s
                length_s = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
                yield _Picture(frame, self._stream.sample_aspect_ratio, self._max_patches, time_s, length_s)

    def note(self, end_s: float | None) -> str:
        """Returns what was wrong, as a sentence, or nothing. `end_s`: end of the last frame, if all were read."""
        if end_s is not None and (length_s := _length_s(self._stream)):
            promised_s = length_s + _start_s(self._stream) - self._origin_s
            if end_s + _MISSING_S < promised_s:
                return f"the video is cut short or damaged: its pictures end at {end_s:.1f} s of {promised_s:.1f} s"
        if self._damaged:
            return f"the video is damaged: {self._damaged} pieces that cannot be decoded are left out"
        return ""


class _Picture:
    """A frame of a video, with its times in seconds of the session. It is converted once, when it is needed."""

    def __init__(self, frame: Any, pixel_shape: Any, max_patches: int, start_s: float, length_s: float):
        self._frame, self._pixel_shape, self._max_patches = frame, pixel_shape, max_patches
        self.start_s, self.end_s = start_s, start_s + max(length_s, MICRO_TURN_MS / 1000)
        self._array: np.ndarray | None = None

    def array(self) -> np.ndarray:
        """Returns the picture as a player shows it, `[H, W, 3]` uint8. Raises `ValueError` if no size fits."""
        if self._array is None:
            frame, matrix = self._frame, _display_matrix(self._frame)
            height, width = frame.height, max(1, round(frame.width * float(self._pixel_shape or 1)))
            is_turned = abs(matrix[1]) > abs(matrix[0])
            size = fitted_size(*((width, height) if is_turned else (height, width)), self._max_patches)
            size = size[::-1] if is_turned else size
            array = frame.reformat(width=size[1], height=size[0], format="rgb24").to_ndarray()
            self._array, self._frame = _oriented(array, matrix), None
        return self._array


def _start_s(stream: Any) -> float:
    return float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0


def _length_s(stream: Any) -> float:
    """Returns the length that the file promises, in seconds; 0 if it promises none. Matroska has it as a tag."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = _DURATION.fullmatch(stream.metadata.get("DURATION", ""))
    return sum(float(part) * unit for part, unit in zip(tag.groups(), (3600, 60, 1), strict=True)) if tag else 0.0


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Returns a, b, c, d of the frame's display matrix: the pixel (x, y) is shown at (a x + c y, b x + d y)."""
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(stored, np.int32)[:5].tolist()
    return a, b, c, d


def _oriented(array: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turns and mirrors a picture `[H, W, 3]` as its display matrix says, by the nearest quarter turn."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        array, across, down = array.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(array[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
