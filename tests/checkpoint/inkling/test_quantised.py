"""Quantised experts become the numbers that their formats define, and tensors in no known format are named."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, create_file, header_text, read_header, write_at
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint, read_checkpoint
from jaxtml.checkpoint.source import full_index
from jaxtml.convert.conversion import convert
from jaxtml.errors import InputError
from jaxtml.model.spec import flatten

ROOT = Path(__file__).parents[3]
TOOL = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_backbone_golden.py"), run_name="golden")
# Widths that are multiples of 16 and of 32: in NVFP4, 16 columns share a scale, and in MXFP8, 32 do.
DESCRIBED = TOOL["released_config"](hidden_size=64, intermediate_size=32, dense_intermediate_size=48)
PREFIX = "model.llm.layers.{}.mlp.experts.{}_weight"
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def nvfp4(weight: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns random NVFP4 codes for `weight` `[E, N, K]`, and the numbers that they mean, computed one by one."""
    e, n, k = weight.shape
    codes = rng.integers(0, 16, weight.shape)
    scale = rng.uniform(0.1, 2, (e, n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
    scale2 = rng.uniform(0.1, 1, e).astype(np.float32)
    numbers = np.empty(weight.shape, np.float32)
    for i, j, m in np.ndindex(*weight.shape):
        numbers[i, j, m] = E2M1[codes[i, j, m]] * np.float32(scale[i, j, m // 16]) * scale2[i]
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    beside = {".scale": scale, ".scale2": scale2, ".input_amax": np.ones(1, np.float32),
              ".original_shape": np.array(weight.shape, np.int64)}  # fmt: skip
    return {"": packed, **beside}, numbers


def mxfp8(weight: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns random MXFP8 codes for `weight` `[E, N, K]`, and the numbers that they mean, computed one by one."""
    e, n, k = weight.shape
    codes = rng.normal(size=weight.shape).astype(ml_dtypes.float8_e4m3fn)
    exponent = rng.integers(120, 130, (e, n, k // 32)).astype(np.uint8)
    numbers = np.empty(weight.shape, np.float32)
    for i, j, m in np.ndindex(*weight.shape):
        numbers[i, j, m] = np.float32(codes[i, j, m]) * 2.0 ** (int(exponent[i, j, m // 32]) - 127)
    return {"": codes, ".scale": exponent}, numbers


FORMATS = {"nvfp4": nvfp4, "mxfp8": mxfp8}


def checkpoint(folder: Path, kind: str, left_out: int = 1) -> dict[str, np.ndarray]:
    """Writes a release with quantised experts in all layers but `left_out`.

    Returns the numbers of all experts by the tensor's name: what the codes mean, or the values of the layer `left_out`.
    """
    config = config_from_inkling(DESCRIBED)
    weights = {name: np.asarray(w, ml_dtypes.bfloat16) for name, w in TOOL["released_weights"](config).items()}
    meant, rng = {}, np.random.default_rng(3)
    for layer in range(config.backbone.n_dense, config.backbone.n_layers):
        for which in ("w13", "w2"):
            name = PREFIX.format(layer, which)
            if layer == left_out:
                meant[name] = weights[name].astype(np.float32)
                continue
            parts, meant[name] = FORMATS[kind](weights.pop(name), rng)
            weights |= {name + suffix: part for suffix, part in parts.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DESCRIBED))
    stored = create_file(
        folder / "model.safetensors", header_text((name, w.shape, w.dtype) for name, w in weights.items())
    )
    for name, tensor in stored.items():
        write_at(tensor, 0, np.ascontiguousarray(weights[name]))
    return meant


@pytest.mark.parametrize("kind", FORMATS)
def test_experts_are_read_as_bfloat16_in_our_layout(kind, tmp_path):
    meant = checkpoint(tmp_path, kind)
    source = ReleasedCheckpoint(tmp_path)
    checked = 0
    for (path, position), tensor in source.tensors.items():
        if tensor.name in meant:
            spec = source.specs[path]
            index = (*(slice(i, i + 1) for i in position), *full_index(spec)[2:])
            ours = source.read(path, index)[0, 0]
            assert ours.dtype == ml_dtypes.bfloat16
            expected = tensor.layout.load(meant[tensor.name]).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(ours, expected, err_msg=tensor.name)
            part = (*index[:2], slice(1, 4), *[slice(1, None)] * (len(index) - 3))
            np.testing.assert_array_equal(source.read(path, part)[0, 0], expected[part[2:]])
            checked += 1
    assert checked == len(meant) == 6


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_release_is_converted_and_verified(kind, tmp_path):
    checkpoint(tmp_path / "hf", kind)
    summary = convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    assert "verified" in summary and "logits of 64 tokens too" in summary
    (_, theirs), (_, ours) = read_checkpoint(tmp_path / "hf"), read_checkpoint(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    assert {open_checkpoint(tmp_path / "ours").dtype(path).name for path, _ in flatten(ours)} == {"bfloat16", "float32"}


def _change(folder: Path, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Rewrites the file with zeros of another shape and dtype for one tensor."""
    path = folder / "model.safetensors"
    weights = {n: np.array(tensor.mapped()) for n, tensor in read_header(path).items()}
    weights[name] = np.zeros(shape, DTYPES[dtype])
    path.unlink()
    for n, tensor in create_file(path, header_text((n, w.shape, w.dtype) for n, w in weights.items())).items():
        write_at(tensor, 0, np.ascontiguousarray(weights[n]))


@pytest.mark.parametrize(
    ("kind", "suffix", "shape", "dtype", "message"),
    [
        ("nvfp4", ".scale", (6, 64, 2), "F8_E4M3", "no quantised format that jaxtml knows"),
        ("nvfp4", ".scale", (6, 64, 4), "F32", ".scale is F32, not F8_E4M3"),
        ("nvfp4", ".scale2", (1,), "F32", r".scale2 is \(1,\), not \(6,\)"),
        ("mxfp8", ".scale", (6, 64, 2), "F32", ".scale is F32, not F8_E8M0 or U8"),
        ("mxfp8", "", (6, 64, 64), "U8", "weight is U8, not F8_E4M3"),
    ],
)
def test_a_tensor_in_no_known_format_is_named(kind, suffix, shape, dtype, message, tmp_path):
    checkpoint(tmp_path, kind)
    name = PREFIX.format(2, "w13")
    _change(tmp_path, name + suffix, shape, dtype)
    with pytest.raises(InputError, match=f"1 misfitting tensors: {name} is .*{message}"):
        ReleasedCheckpoint(tmp_path)
