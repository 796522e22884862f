"""Dequantises the weights of the NVFP4 and MXFP8 releases of Inkling to bfloat16. Only routed experts are quantised.

Axes: E experts, N rows, K columns. Each row is cut into groups of columns. A group has one scale.

| format | weight | `.scale` | `.scale2` |
|---|---|---|---|
| NVFP4 | U8 `[E, N, K / 2]` | E4M3 `[E, N, K / 16]` | F32 `[E]` |
| MXFP8 | E4M3 `[E, N, K]` | E8M0, or its bytes as U8, `[E, N, K / 32]` | |

A byte of an NVFP4 weight is two E2M1 numbers, the first in the lower half. NVFP4 also has `.input_amax` (for quantised
activations) and `.original_shape`, which are not needed here. Some layers of a release may be left in bfloat16.

Sources: the loaders of `vllm` and `tokenspeed` for `thinkingmachines/Inkling-NVFP4`; OCP Microscaling Formats 1.0,
2023. Called by `checkpoint.inkling.source`.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, StoredTensor

NVFP4_GROUP, MXFP8_GROUP = 16, 32  # columns that share a scale
UNUSED = (".input_amax", ".original_shape")
_SUFFIXES = (".scale", ".scale2", *UNUSED)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_E2M1_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)  # [byte, its two numbers]


def quantisation_parts(name: str, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors beside the weight `name` that belong to it, by suffix. Empty if it is not quantised."""
    return {suffix: stored[name + suffix] for suffix in _SUFFIXES if name + suffix in stored}


def logical_shape(weight: StoredTensor, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """Returns the shape `(E, N, K)` of the dequantised weight.

    Raises:
      ValueError: weight and scales are in neither of the two formats.
      KeyError: there is no `.scale`.
    """
    *outer, columns = weight.shape
    if ".scale2" in parts:
        columns, group = 2 * columns, NVFP4_GROUP
        wanted = {"weight": ("U8",), ".scale": ("F8_E4M3",), ".scale2": ("F32",)}
    else:
        group = MXFP8_GROUP
        wanted = {"weight": ("F8_E4M3",), ".scale": ("F8_E8M0", "U8")}
    for suffix, dtypes in wanted.items():
        tensor = weight if suffix == "weight" else parts[suffix]
        if tensor.dtype not in dtypes:
            raise ValueError(f"{suffix} is {tensor.dtype}, not {' or '.join(dtypes)}")
    if parts[".scale"].shape != (*outer, columns // group) or columns % group:
        scales = parts[".scale"].shape
        raise ValueError(f".scale is {scales}, but weights {(*outer, columns)} need a scale for each {group} columns")
    if ".scale2" in parts and parts[".scale2"].shape != tuple(outer[:1]):
        raise ValueError(f".scale2 is {parts['.scale2'].shape}, not {tuple(outer[:1])}")
    return (*outer, columns)


def dequantise(weight: StoredTensor, scales: Mapping[str, StoredTensor], experts: slice, rows: slice) -> np.ndarray:
    """Returns some rows of some experts as bfloat16 `[E, N, K]`."""
    codes, scale = weight.mapped()[experts, rows], scales[".scale"].mapped()[experts, rows]
    if ".scale2" in scales:
        numbers = _E2M1_PAIRS[codes].reshape(*codes.shape[:-1], -1, NVFP4_GROUP)
        factor = scale.astype(np.float32) * scales[".scale2"].mapped()[experts][:, None, None]
    else:
        numbers = codes.astype(np.float32).reshape(*codes.shape[:-1], -1, MXFP8_GROUP)
        factor = scale.view(DTYPES["F8_E8M0"]).astype(np.float32)
    values = numbers * factor[..., None]
    return values.reshape(*codes.shape[:-1], -1).astype(ml_dtypes.bfloat16)
