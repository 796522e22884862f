"""Arrays with permuted axes are copied as NumPy would copy them, whatever their sides and number of dimensions."""

import ml_dtypes
import numpy as np
import pytest

from jaxtml.checkpoint.transposed_copy import copy_contiguous


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((2, 33, 2, 40), (0, 2, 3, 1)),  # as experts are stored, within one block
        ((1, 600, 2, 900), (0, 2, 3, 1)),  # several blocks, the last of each side not full
        ((1030, 520), (1, 0)),
        ((40, 3, 700), (2, 1, 0)),
        *(((5, 130, 200), axes) for axes in [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0)]),
        ((5, 7), (1, 0)),  # too small for a buffer
        ((64, 64), (0, 1)),  # not permuted
    ],
)
def test_an_array_with_permuted_axes_is_copied_in_its_own_order(shape, axes, dtype):
    bits = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), np.uint8)
    view = bits.view(dtype).transpose(axes)
    copied = copy_contiguous(view)
    assert copied.flags.c_contiguous and copied.dtype == view.dtype
    assert copied.tobytes() == view.tobytes()
    part = view[tuple(slice(1, None) for _ in view.shape)]
    out = np.empty(part.shape, dtype)
    assert copy_contiguous(part, out) is out and out.tobytes() == part.tobytes()
