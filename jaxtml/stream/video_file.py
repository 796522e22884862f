"""Reads a video file as frame pairs, one per micro-turn (200 ms): what the camera showed 100 ms before, and shows now.

Called by `converse --video`. PyAV decodes.

Axes: H x W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxtml.errors import InputError
from jaxtml.stream.images import fitted_size
from jaxtml.stream.timebase import MICRO_TURN_MS


def read_frame_pairs(path: str | Path, micro_turns: int, max_patches: int) -> list[np.ndarray]:
    """Returns `[2, H, W, 3]` uint8 for each micro-turn that the video covers.

    The two frames are those 100 ms before the start of the micro-turn, and at its start.

    Args:
      path: the video file.
      micro_turns: length of the session; later frames are not read.
      max_patches: frames are scaled down, keeping their aspect ratio, until their grid has at most this many patches.

    Raises:
      InputError: there is no such file, it holds no video, or its frames do not fit into `max_patches` at any size.
    """
    import av
    from av.error import FFmpegError

    if not Path(path).is_file():
        raise InputError(f"no video file {path}")
    times: list[float] = []
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video")
            size: tuple[int, int] | None = None
            for frame in container.decode(video=0):
                if frame.time is not None and frame.time * 1000 > micro_turns * MICRO_TURN_MS:
                    break
                size = size or fitted_size(frame.height, frame.width, max_patches)
                times.append(float(frame.time or 0.0))
                frames.append(frame.reformat(width=size[1], height=size[0], format="rgb24").to_ndarray())
    except FFmpegError as error:  # Before ValueError, because some of PyAV's errors are both.
        raise InputError(f"{path} is not a video that can be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if not frames:
        raise InputError(f"{path} holds no frame of video")
    starts = np.arange(micro_turns) * MICRO_TURN_MS / 1000
    starts = starts[starts <= times[-1] + MICRO_TURN_MS / 1000]
    now = np.maximum(np.searchsorted(times, starts, side="right") - 1, 0)
    earlier = np.maximum(np.searchsorted(times, starts - 0.1, side="right") - 1, 0)
    return [np.stack([frames[a], frames[b]]) for a, b in zip(earlier, now, strict=True)]
