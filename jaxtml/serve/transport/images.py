"""Pictures that a client sends, JPEG, PNG or a video's, as the patches of a micro-turn. Called by the protocols."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from av.error import FFmpegError

from jaxtml.stream.images import fitted_size, image_patches

PIXELS = 2**22  # of the largest picture that is decoded
_PAIR_S = 0.5  # how long ago a picture may be to stand before the next one
# Of all sessions, one picture of each at a time, in the order in which they come: more would make ticks late.
THREAD = ThreadPoolExecutor(1, "pictures")


class ImageIntake:
    """One session's camera. A picture is seen beside the one before it, or twice where that is too long ago.

    Args:
      max_patches: of a micro-turn; 0: the model does not see.
    """

    def __init__(self, max_patches: int):
        self.max_patches = max_patches
        self._before: tuple[float, np.ndarray] | None = None

    def put(self, data: bytes) -> np.ndarray:
        """`[P, 2, 40, 40, 3]` float32. Raises `ValueError` on what is no picture, or one too large or too long."""
        if not self.max_patches:
            raise ValueError("this model does not see")
        return self.look(self._decoded(data))

    def look(self, picture: av.VideoFrame) -> np.ndarray:
        """The same of a picture that is decoded already."""
        height, width = fitted_size(picture.height, picture.width, self.max_patches)
        now, frame = time.monotonic(), picture.reformat(width=width, height=height, format="rgb24").to_ndarray()
        before = frame
        if self._before is not None and now - self._before[0] < _PAIR_S and self._before[1].shape == frame.shape:
            before = self._before[1]
        self._before = now, frame
        return image_patches(np.stack([before, frame]))

    def _decoded(self, data: bytes) -> av.VideoFrame:
        kind = "png_pipe" if data.startswith(b"\x89PNG") else "jpeg_pipe" if data.startswith(b"\xff\xd8") else None
        if kind is None:
            raise ValueError("a picture is JPEG or PNG")
        try:
            with av.open(io.BytesIO(data), "r", format=kind) as container:
                shape = container.streams.video[0].codec_context
                if not 0 < shape.width * shape.height <= PIXELS:
                    raise ValueError(f"a picture of {shape.width} x {shape.height} pixels is too large")
                return next(container.decode(video=0))
        except (FFmpegError, StopIteration, IndexError) as error:
            raise ValueError("this picture cannot be read") from error
