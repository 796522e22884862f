"""Copies of arrays whose axes are permuted."""

from __future__ import annotations

import numpy as np

# Blocks in which a matrix is turned: less than half a megabyte, which a core's second cache holds.
_BLOCK_ROWS, _BLOCK_BYTES, _PADDING = 512, 768, 8
_SMALLEST = 32  # sides of matrices that are not worth a buffer


def copy_contiguous(view: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`view` copied to `out` (None: a new array) in its own order of axes.

    A matrix that lies turned is copied block by block through a buffer whose rows are not a power of two apart: NumPy's
    own copy goes to lines of a cache that all belong in the same few places of it, and takes three to eight times as
    long. Numbers are copied as integers: NumPy calls `ml_dtypes` for each of theirs.
    """
    if out is None:
        out = np.empty(view.shape, view.dtype)
    if out.dtype != view.dtype:
        raise TypeError(f"{view.dtype} is not {out.dtype}: numbers are copied as they are")
    result, plain = out, np.dtype(f"u{view.itemsize}")
    view, out = view.view(plain), out.view(plain)
    fast = next(
        (i for i, step in enumerate(view.strides) if step == view.itemsize and view.shape[i] > 1), view.ndim - 1
    )
    last = view.ndim - 1
    if fast == last or min(view.shape[fast], view.shape[last]) < _SMALLEST:
        out[...] = view
        return result
    width = _BLOCK_BYTES // view.itemsize
    buffer = np.empty((_BLOCK_ROWS, width + _PADDING), plain)
    others = [i for i in range(view.ndim) if i not in (fast, last)]
    order = (*others, last, fast)
    view, out = view.transpose(order), out.transpose(order)
    for at in np.ndindex(view.shape[: len(others)]):
        matrix, turned = view[at], out[at]
        for row in range(0, matrix.shape[0], _BLOCK_ROWS):
            for column in range(0, matrix.shape[1], width):
                block = np.s_[row : row + _BLOCK_ROWS, column : column + width]
                part = matrix[block]
                held = buffer[: part.shape[0], : part.shape[1]]
                held[...] = part
                turned[block] = held
    return result
