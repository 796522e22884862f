"""Pictures from clients (JPEG, PNG, or frames of a video) as patches for the model.

Called by `serve.sessions.intake`, in the thread of `IMAGE_EXECUTOR`.

In one micro-turn (200 ms) the model sees one pair of pictures: the newest one and the one before it.

Axes: P patches of a pair of pictures, each 40 x 40 pixels, 3 colour channels (RGB).
"""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from av.error import FFmpegError

from jaxtml.stream.images import fitted_size, image_patches

MAX_PIXELS = 2**24  # a larger picture is not decoded; photos of phones have 12 million pixels
_MAX_PAIR_S = 0.5  # the most time between the two pictures of a pair
# One thread for all sessions, one picture at a time, in order of arrival: more threads would make ticks late.
IMAGE_EXECUTOR = ThreadPoolExecutor(1, "pictures")


class ImageIntake:
    """The pictures of one session.

    The model sees pairs: each picture with the picture before it. If there was no picture before, or if that picture is
    too old or has another shape, the model sees the new picture twice.

    Args:
      max_patches: the most patches of a micro-turn; 0: the model takes no pictures.
    """

    def __init__(self, max_patches: int):
        self.max_patches = max_patches
        self._previous: tuple[float, np.ndarray] | None = None  # when it came, and the picture `[H, W, 3]` uint8

    def patches_of_image(self, data: bytes) -> np.ndarray:
        """Decodes a JPEG or PNG and returns its patches, as `patches_of_frame`.

        Raises:
          ValueError: the model takes no pictures, `data` is no picture, or the picture has too many pixels or is
            too narrow to be cut into patches.
        """
        if not self.max_patches:
            raise ValueError("this model does not take pictures")
        return self.patches_of_frame(self._decode(data))

    def patches_of_frame(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns the patches of a decoded picture paired with the one before it, `[P, 2, 40, 40, 3]` float32.

        Raises:
          ValueError: the picture's shape cannot be cut into patches.
        """
        height, width = fitted_size(frame.height, frame.width, self.max_patches)
        now, picture = time.monotonic(), frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        before = picture
        if self._previous is not None:
            previous_at, previous = self._previous
            if now - previous_at < _MAX_PAIR_S and previous.shape == picture.shape:
                before = previous
        self._previous = now, picture
        return image_patches(np.stack([before, picture]))

    def _decode(self, data: bytes) -> av.VideoFrame:
        kind = "png_pipe" if data.startswith(b"\x89PNG") else "jpeg_pipe" if data.startswith(b"\xff\xd8") else None
        if kind is None:
            raise ValueError("a picture must be JPEG or PNG")
        try:
            with av.open(io.BytesIO(data), "r", format=kind) as container:
                header = container.streams.video[0].codec_context
                if not 0 < header.width * header.height <= MAX_PIXELS:
                    raise ValueError(
                        f"a picture of {header.width} x {header.height} pixels is too large: "
                        f"the limit is {MAX_PIXELS} pixels"
                    )
                return next(container.decode(video=0))
        except (FFmpegError, StopIteration, IndexError) as error:
            raise ValueError("this picture cannot be read") from error
