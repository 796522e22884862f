"""Every implementation of the grouped SwiGLU gives what plain matrix products give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.model.experts.grouped import _swiglu_blocks, _swiglu_in_place, _swiglu_megablox, _swiglu_ragged_dot
from jaxtml.model.experts.weights import ExpertWeights, quantise_columns


@pytest.mark.parametrize("implementation", [_swiglu_blocks, _swiglu_ragged_dot, _swiglu_megablox])
def test_every_implementation_equals_plain_matmuls(implementation):
    rng = np.random.default_rng(0)
    block, sizes, dim, width = 8, np.array([16, 0, 8, 24]), 128, 128
    rows, w13, w2 = (jnp.asarray(0.3 * rng.normal(size=s), jnp.float32)
                     for s in ((64, dim), (4, 2, dim, width), (4, width, dim)))  # fmt: skip
    used = int(sizes.sum())

    def plain(rows, w13, w2):
        expert = np.repeat(np.arange(4), sizes)
        gate, up = (jnp.einsum("nd,ndf->nf", rows[:used], w13[expert, i]) for i in (0, 1))
        return jnp.einsum("nf,nfd->nd", jax.nn.silu(gate) * up, w2[expert])

    def ours(rows, w13, w2):
        options = {
            _swiglu_blocks: {"block": block},
            _swiglu_ragged_dot: {},
            _swiglu_megablox: {"block": block, "interpret": True},
        }
        return implementation(rows, jnp.asarray(sizes), w13, w2, **options[implementation])[:used]

    grad = jnp.asarray(rng.normal(size=(used, dim)), jnp.float32)
    for name, function in (
        ("out", lambda f: f(rows, w13, w2)),
        ("grads", lambda f: jax.vjp(f, rows, w13, w2)[1](grad)),
    ):
        for a, b in zip(jax.tree.leaves(function(ours)), jax.tree.leaves(function(plain)), strict=True):
            b = b[:used] if b.shape == rows.shape else b
            np.testing.assert_allclose(a[: len(b)], b, rtol=2e-4, atol=2e-4, err_msg=name)


def test_a_gpu_does_not_read_int8_experts_in_place_where_offsets_would_overflow():
    def experts(layers: int, dtype: str) -> ExpertWeights:
        w13, w2 = (jax.ShapeDtypeStruct((layers, 64, *s), dtype) for s in ((2, 4096, 512), (512, 4096)))
        scales = [jax.ShapeDtypeStruct(w.shape[:-2] + w.shape[-1:], "float32") for w in (w13, w2)]
        return ExpertWeights(w13, w2, *(scales if dtype == "int8" else (None, None)), layer_index=(jnp.int32(0),))

    # Offsets overflow in int8 arrays of more than 2 and at most 4 GiB (see `in_place_on_gpu`). A layer has 2**28
    # numbers in w13 and half as many in w2. As int8, w13 is below 2 GiB with 7 layers and between 2 and 4 GiB with 9.
    # With 17 layers w2 is between 2 and 4 GiB. With 33 layers both are larger than 4 GiB.
    assert [experts(layers, "int8").in_place_on_gpu for layers in (7, 9, 17, 33)] == [True, False, False, True]
    assert all(experts(layers, "bfloat16").in_place_on_gpu for layers in (4, 7, 9, 17, 33))


@pytest.mark.parametrize(("platform", "block"), [("tpu", 8), ("cuda", 8), ("cuda", 32)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("groups", [(2, 0, 1, 3), (0, 0, 1, 0), (0, 0, 0, 0)], ids=str)
def test_serving_kernels_read_experts_where_they_are_in_the_stack(groups, int8, platform, block):
    rng = np.random.default_rng(0)
    dim, width, sizes = 256, 128, [block * group for group in groups]
    rows = jnp.asarray(rng.normal(size=(8 * block, dim)), jnp.float32)
    w13, w2 = (jnp.asarray(0.1 * rng.normal(size=(2, 3, *s)), jnp.float32)
               for s in ((4, 2, dim, width), (4, width, dim)))  # fmt: skip
    (w13, scale13), (w2, scale2) = (quantise_columns(w) if int8 else (w, None) for w in (w13, w2))
    experts = ExpertWeights(w13, w2, scale13, scale2, (jnp.int32(1), jnp.int32(2)))
    assert experts.in_place and experts.in_place_on_gpu and experts.count == 4
    ours = _swiglu_in_place(rows, jnp.asarray(sizes), experts, block, len(rows), platform, interpret=True)
    plain13, plain2 = experts.layer(jnp.float32)
    owner = np.repeat(np.arange(4), sizes)
    used = len(owner)
    gate, up = (jnp.einsum("nd,ndf->nf", rows[:used], plain13[owner, i]) for i in (0, 1))
    expected = jnp.einsum("nf,nfd->nd", jax.nn.silu(gate) * up, plain2[owner])
    np.testing.assert_allclose(ours[:used], expected, rtol=1e-4, atol=1e-4)
