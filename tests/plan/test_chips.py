"""What the compilers make of one layer, for chips that this machine lacks.

There is no needless matrix product, no array that is too large for a long sequence, and no copy of a stack's experts.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.plan.compilers import CUDA, LIBTPU, ROOT, environment


def compile_layer(topology: str) -> dict:
    command = [sys.executable, "tests/plan/layer_on_chip.py", topology]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu (pip install -e '.[plan]')")
@pytest.mark.parametrize(
    ("topology", "most_bytes"),
    [
        pytest.param("v5p:2x2x1", 0.93e9, marks=pytest.mark.slow),
        ("v6e:2x2", 0.8e9),
        pytest.param("tpu7x:2x2x1", 1.05e9, marks=pytest.mark.slow),
    ],
)
def test_a_tpu_computes_no_needless_product_and_needs_little_memory(topology, most_bytes):
    found = compile_layer(topology)
    # A dense product over all experts would be 5.7 times the FLOPs that the tokens need.
    assert 1 <= found["moe"]["compiled"] < 1.1
    assert found["moe"]["compiled"] == pytest.approx(found["moe"]["counted"], rel=0.01)
    # With 32,768 tokens, the logits of one head alone are 2.1e9 bytes in bfloat16, and so are the biases by distance of
    # all eight heads. The smallest such bias of a long sequence, `[T, H, 512]`, would be 0.27e9 more.
    assert max(found["attention"].values()) < most_bytes
    # With retained tokens, there are two softmaxes, and a list of the tokens beyond the window.
    assert found["retaining"] < most_bytes + 0.6e9
    # A copy of the smallest part of a layer, w2, would be 4.2e6 bytes in int8 and 8.4e6 in bfloat16. With blocks of 128
    # rows, the result of the first product has 4.2e6 bytes.
    assert found["in_place"]["8 True"] < 1e6 and found["in_place"]["128 False"] < 6e6


@pytest.mark.skipif(not CUDA, reason="needs jax-cuda12-plugin and tokamax (pip install -e '.[plan-cuda]')")
def test_a_gpu_multiplies_little_padding_and_needs_little_memory():
    """The compiler for GPUs gives no FLOPs. The test counts those of `ragged_dot`, on the rows that tokamax gets."""
    found = compile_layer("h100:1x8")
    assert 1 <= found["moe"]["counted"] < 1.1
    assert found["attention"]["global"] < 0.8e9 and found["attention"]["sliding"] < 0.5e9
    # The program needs memory for blocks that are padded to 16 rows, and for the result of the first product. A copy of
    # w2 would need 4.2e6 bytes more.
    assert found["in_place"]["8 True"] < 3e6 and found["in_place"]["128 False"] < 6e6
