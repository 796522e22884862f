"""Cuts images and video frames into patches of 40 x 40 pixels. The model embeds each patch as one token.

The patches equal exactly those of the released image processor (`InklingImageProcessor` of transformers 5.23), as the
tests check. Called by `jaxtml.stream.encoding`, `converse --video` and the server.

Axes: 2 frames in order of time, H x W pixels, P patches row by row, 3 colours (red, green, blue).
"""

from __future__ import annotations

import numpy as np

PATCH = 40
"""Pixels of a patch in each direction."""

_PAD = np.float32(-1.0)  # the value of pixels outside the picture, before the mean is subtracted
# OpenAI CLIP's mean and standard deviation of pixels between 0 and 1, scaled to pixels between 0 and 255. The product
# is taken in float32, as in the released code.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32) * np.float32(255.0)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32) * np.float32(255.0)


def patch_grid(height: int, width: int) -> tuple[int, int]:
    """Returns `(rows, columns)` of the patches of a picture.

    The last column always holds some padding. If the width is a multiple of 40, an extra column holds padding alone.
    This padding is the only sign by which the model knows where a row of patches ends.
    """
    return -(-height // PATCH), width // PATCH + 1


def fitted_size(height: int, width: int, max_patches: int) -> tuple[int, int]:
    """Returns the largest `(height, width)` of the same aspect ratio whose grid has at most `max_patches` patches.

    Sizes are tried in steps of one per cent.

    Raises:
      ValueError: no size fits.
    """
    for percent in range(100, 0, -1):
        size = max(1, height * percent // 100), max(1, width * percent // 100)
        rows, columns = patch_grid(*size)
        if rows * columns <= max_patches:
            return size
    raise ValueError(f"no size of {width} x {height} fits into {max_patches} patches")


def image_patches(frames: np.ndarray) -> np.ndarray:
    """Cuts a still picture, or two video frames 100 ms apart, into patches `[P, 2, 40, 40, 3]` float32.

    P is rows times columns of `patch_grid`. A still picture is used for both times. The released processor only knows
    still pictures, so it does not define which of two frames comes first. In this project the earlier frame does.

    Args:
      frames: `[H, W, 3]` or `[2, H, W, 3]` uint8.

    Raises:
      ValueError: `frames` has another shape or dtype, or is empty.
    """
    if frames.dtype != np.uint8 or frames.shape[-1:] != (3,) or frames.shape[:-3] not in ((), (2,)) or frames.size == 0:
        raise ValueError(f"frames are [H, W, 3] or [2, H, W, 3] uint8, not empty; got {frames.shape} {frames.dtype}")
    times = frames[None] if frames.ndim == 3 else frames
    height, width = times.shape[1:3]
    rows, columns = patch_grid(height, width)
    padded = np.full((len(times), rows * PATCH, columns * PATCH, 3), _PAD, np.float32)
    padded[:, :height, :width] = times
    normal = (padded - _MEAN) / _STD
    tiles = normal.reshape(len(times), rows, PATCH, columns, PATCH, 3).transpose(1, 3, 0, 2, 4, 5)
    return np.broadcast_to(tiles, (rows, columns, 2, PATCH, PATCH, 3)).reshape(-1, 2, PATCH, PATCH, 3)
