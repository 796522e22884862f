"""The attention kernels, interpreted, give what plain attention gives, also at the edges of blocks and windows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxtml.model.attention.flash import flash_attention, rotate_rows, rotate_rows_back
from jaxtml.model.numerics import MASKED_LOGIT

H, G, K, R = 4, 2, 16, 8


def attend_plainly(query, keys, values, rel, proj, scale, segments, window):
    """Returns attention `[B, H, T, K]`, with every logit in one array."""
    tokens, extent = query.shape[2], proj.shape[1]
    keys, values = (jnp.repeat(a, H // G, axis=1) for a in (keys, values))
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    inside = (distance >= 0) & (distance < extent)
    profile = rel @ proj
    index = np.broadcast_to(np.clip(distance, 0, extent - 1), (*rel.shape[:2], *distance.shape))
    bias = jnp.where(inside, jnp.take_along_axis(profile, index, axis=-1), 0)
    logits = (jnp.einsum("bhik,bhjk->bhij", query, keys) + bias) * scale[:, None]
    seen = (distance >= 0) & (distance < window) & (segments[:, None, :, None] == segments[:, None, None, :])
    return jnp.einsum("bhij,bhjk->bhik", jax.nn.softmax(jnp.where(seen, logits, MASKED_LOGIT), axis=-1), values)


def operands(tokens: int, extent: int, seed: int = 0, batch: int = 2):
    rng = np.random.default_rng(seed)
    shapes = ((batch, H, tokens, K), (batch, G, tokens, K), (batch, G, tokens, K), (batch, H, tokens, R), (R, extent))
    return [jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("tokens", "window", "extent"),
    [
        (384, 100, 100),  # the window ends within one block
        (384, 150, 200),  # the extent is longer than the window
        (500, 1000, 130),  # global; the extent ends inside a block, and so do the tokens
        (384, 257, 1),  # a bias only on the query's own key; a window of complete blocks and one token
        (128, 128, 128),  # one block
        (30, 7, 9),  # less than one block
        (300, 1, 5),  # each token sees only itself
    ],
)
def test_kernels_equal_plain_attention_forwards_and_backwards(tokens, window, extent):
    arrays = operands(tokens, extent)
    rng = np.random.default_rng(1)
    scale = jnp.asarray(1 + 0.1 * rng.random(tokens), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, tokens)), axis=1), jnp.int32)
    grad = jnp.asarray(rng.normal(size=(2, H, tokens, K)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def run(function, arrays):
        out, adjoint = jax.vjp(function, *arrays)
        return out, *adjoint(grad)

    ours = run(lambda *a: flash_attention(*a, scale, segments, window=window, block=128, interpret=True)[0], arrays)
    plain = run(lambda *a: attend_plainly(*a, scale, segments, window), arrays)
    for name, a, b in zip(("out", "query", "keys", "values", "rel", "proj"), ours, plain, strict=True):
        assert np.isfinite(a).all(), name
        assert jnp.linalg.norm(a - b) <= 2e-5 * jnp.linalg.norm(b) + 1e-4, name


@pytest.mark.parametrize(("shift", "stride"), [(9, 1), (0, 1)])
def test_the_gather_equals_the_strided_rotation(shift, stride):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)

    def kernel(x, out):
        out[...] = rotate_rows(x[...], shift, stride, interpret=False)

    rotated = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)
    np.testing.assert_array_equal(rotate_rows(x, shift, stride, interpret=True), rotated)


def test_rotating_back_undoes_the_rotation():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)

    def kernel(x, out):
        out[...] = rotate_rows_back(x[...], 8)

    back = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)
    np.testing.assert_array_equal(back(rotate_rows(x, 9, 1, interpret=True)), x)


def test_the_size_of_a_block_changes_nothing():
    arrays = operands(512, 200, batch=1)
    scale, segments = jnp.ones(512), jnp.zeros((1, 512), jnp.int32)
    small, large = (
        flash_attention(*arrays, scale, segments, window=300, block=block, interpret=True)[0] for block in (128, 256)
    )
    np.testing.assert_allclose(small, large, rtol=2e-5, atol=1e-6)


def test_the_first_token_sees_itself_alone():
    arrays = operands(256, 64)
    scale, segments = jnp.ones(256), jnp.zeros((2, 256), jnp.int32)
    out, _ = flash_attention(*arrays, scale, segments, window=64, block=128, interpret=True)
    np.testing.assert_allclose(out[:, :, 0], jnp.repeat(arrays[2][:, :, 0], H // G, axis=1), rtol=1e-6)
