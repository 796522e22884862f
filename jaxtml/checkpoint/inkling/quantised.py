"""Weights of the quantised Inkling releases as bfloat16: NVFP4 and MXFP8, of which the routed experts alone are made.

Axes: E experts, N rows, K columns. A row is cut into groups of columns that share a scale:

| format | weight | `.scale` | `.scale2` |
|---|---|---|---|
| NVFP4 | U8 `[E, N, K / 2]`: two E2M1 numbers, the first in the lower half | E4M3 `[E, N, K / 16]` | F32 `[E]` |
| MXFP8 | E4M3 `[E, N, K]` | E8M0, or its bytes, `[E, N, K / 32]` | |

NVFP4 also carries `.input_amax` (for quantised activations) and `.original_shape`, of which weights make no use. Some
layers may be left in bfloat16. Sources: the loaders of `vllm` and `tokenspeed` for `thinkingmachines/Inkling-NVFP4`;
OCP Microscaling Formats 1.0, 2023. Called by `checkpoint.inkling.source`.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, StoredTensor

UNUSED = (".input_amax", ".original_shape")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)  # byte -> its two numbers
NVFP4_GROUP, MXFP8_GROUP = 16, 32


def quantisation_parts(name: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What belongs to the tensor `name` beside it, by suffix: `.scale`, `.scale2` and what is not used."""
    suffixes = (".scale", ".scale2", *UNUSED)
    return {suffix: tensors[name + suffix] for suffix in suffixes if name + suffix in tensors}


def logical_shape(weight: StoredTensor, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """The shape of what `decoded` gives.

    Raises:
      ValueError: weight and scales are none of the two formats.
    """
    *outer, columns = weight.shape
    if ".scale2" in parts:
        columns, group = 2 * columns, NVFP4_GROUP
        wanted = {"weight": ("U8",), ".scale": ("F8_E4M3",), ".scale2": ("F32",)}
    else:
        group = MXFP8_GROUP
        wanted = {"weight": ("F8_E4M3",), ".scale": ("F8_E8M0", "U8")}
    for suffix, dtypes in wanted.items():
        found = weight if suffix == "weight" else parts[suffix]
        if found.dtype not in dtypes:
            raise ValueError(f"{suffix} is {found.dtype}, not {' or '.join(dtypes)}")
    if parts[".scale"].shape != (*outer, columns // group) or columns % group:
        raise ValueError(f".scale is {parts['.scale'].shape}, not one of {group} of {(*outer, columns)}")
    if ".scale2" in parts and parts[".scale2"].shape != tuple(outer[:1]):
        raise ValueError(f".scale2 is {parts['.scale2'].shape}, not {tuple(outer[:1])}")
    return (*outer, columns)


def dequantise(weight: StoredTensor, parts: Mapping[str, StoredTensor], experts: slice, rows: slice) -> np.ndarray:
    """Some rows of some experts `[E, N, K]` as bfloat16."""
    codes, scale = weight.mapped()[experts, rows], parts[".scale"].mapped()[experts, rows]
    if ".scale2" in parts:
        numbers = _PAIRS[codes].reshape(*codes.shape[:-1], -1, NVFP4_GROUP)
        factor = scale.astype(np.float32) * parts[".scale2"].mapped()[experts][:, None, None]
    else:
        numbers = codes.astype(np.float32).reshape(*codes.shape[:-1], -1, MXFP8_GROUP)
        factor = scale.view(DTYPES["F8_E8M0"]).astype(np.float32)
    found = numbers * factor[..., None]
    return found.reshape(*codes.shape[:-1], -1).astype(ml_dtypes.bfloat16)
