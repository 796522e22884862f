"""NaN and infinite values are found in every dtype of parameters, and large finite values are not taken for them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxtml.checkpoint.nonfinite import has_nonfinite


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn])
def test_one_value_that_is_not_finite_is_found_among_the_largest_finite_ones(dtype):
    largest = ml_dtypes.finfo(dtype).max
    values = np.array([0, -0.0, largest, -largest, 1], dtype)
    assert not has_nonfinite(values)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        if np.isfinite(np.asarray(value, dtype).astype(np.float32)):
            continue  # a dtype without infinity
        for place in range(len(values)):
            changed = values.copy()
            changed[place] = value
            assert has_nonfinite(changed)


def test_integers_and_empty_arrays_have_no_such_values():
    assert not has_nonfinite(np.full(3, 0x7FC0, np.uint16)) and not has_nonfinite(np.zeros(0, np.float32))
