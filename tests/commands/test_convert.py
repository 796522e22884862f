"""`jaxtml convert` writes the released layout and reads it back."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.model.spec import flatten


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_goes_to_the_released_layout_and_back(jaxtml, refusal, releasable, lively, tmp_path, dtype):
    config = replace(releasable, backbone=replace(releasable.backbone, mtp_heads=0, mtp_global=()))
    params = lively(config)
    save_checkpoint(tmp_path / "ours", config, params)
    status, out, err = jaxtml("convert", tmp_path / "ours", tmp_path / "hf", "--to", "hf", "--dtype", dtype, "--verify")
    assert status == 0, err
    assert "verified" in out
    status, out, err = jaxtml("convert", tmp_path / "hf", tmp_path / "back", "--verify")
    assert status == 0, err
    before, back = dict(flatten(params)), dict(flatten(load_checkpoint(tmp_path / "back")[1]))
    for path in before:
        is_released = path.startswith("layers/") or path in ("unembed", "norm/weight", "audio/weight")
        stays_float32 = path.endswith(("router_bias", "mlp/global_scale"))
        if is_released and not (stays_float32 and dtype == "bfloat16"):
            expected = np.asarray(before[path]).astype(jnp.dtype(dtype)).astype(np.float32)
            np.testing.assert_array_equal(np.asarray(back[path]), expected, err_msg=path)
    assert "name a new directory" in refusal("convert", tmp_path / "ours", tmp_path / "back")
    assert "no checkpoint directory" in refusal("convert", tmp_path / "none", tmp_path / "x")
