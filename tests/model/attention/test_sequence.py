"""Chunks, blocks, windows, pinned tokens and the bias table give what one masked softmax over all keys gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import AttentionConfig
from jaxtml.model.attention import sequence
from jaxtml.model.attention.sequence import attend_sequence

BATCH, GROUPS, PER_GROUP, DIM, RANK = 2, 2, 3, 8, 4


def _attend_everything(config: AttentionConfig, query, keys, values, rel, proj):
    """The definition of attention: all logits, the bias by distance, one mask, one softmax."""
    tokens = query.shape[1]
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    visible = (distance >= 0) & ((distance < config.window) | (np.arange(tokens) < config.pinned))
    inside = (distance >= 0) & (distance < config.rel_extent)
    bias = _bias(rel @ proj, distance, inside, config.rel_extent)
    logits = jnp.einsum("bigqk,bjgk->bgqij", query, keys) + bias
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bgqij,bjgk->bigqk", weights, values)


def _bias(profile, distance, inside, extent):
    """Returns `profile` `[B, T, G, Q, E]` at each query's distances: `[B, G, Q, T, T]`."""
    profile = profile.transpose(0, 2, 3, 1, 4)
    index = np.broadcast_to(np.clip(distance, 0, extent - 1), (*profile.shape[:-1], len(distance)))
    return jnp.where(inside, jnp.take_along_axis(profile, index, axis=-1), 0)


CASES = {
    "one token": (1, AttentionConfig(6, 2, 8, window=12, rel_extent=12)),
    "short windows, ragged end": (75, AttentionConfig(6, 2, 8, window=12, rel_extent=12)),
    "windows of several chunks": (100, AttentionConfig(6, 2, 8, window=37, rel_extent=20)),
    "extent beyond the window": (100, AttentionConfig(6, 2, 8, window=12, rel_extent=40)),
    "all of the past": (75, AttentionConfig(6, 2, 8, window=1000, rel_extent=30)),
    "pinned tokens": (100, AttentionConfig(6, 2, 8, window=24, rel_extent=20, pinned=5)),
    "pinned tokens within the extent": (100, AttentionConfig(6, 2, 8, window=24, rel_extent=60, pinned=5)),
    "the length of a block": (96, AttentionConfig(6, 2, 8, window=33, rel_extent=31)),
}


@pytest.mark.parametrize("max_chunks", [8, 0], ids=["chunks", "block by block"])
@pytest.mark.parametrize("case", CASES)
def test_chunks_and_blocks_equal_one_masked_softmax_forwards_and_backwards(case, max_chunks, monkeypatch):
    monkeypatch.setattr(sequence, "CHUNK", 16)
    monkeypatch.setattr(sequence, "MAX_UNROLLED_CHUNKS", max_chunks)
    monkeypatch.setattr(sequence, "BLOCK", 32)
    tokens, config = CASES[case]
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    operands = (
        draw(BATCH, tokens, GROUPS, PER_GROUP, DIM),
        draw(BATCH, tokens, GROUPS, DIM),
        draw(BATCH, tokens, GROUPS, DIM),
        draw(BATCH, tokens, GROUPS, PER_GROUP, RANK),
        draw(RANK, config.rel_extent),
    )
    grad = draw(*operands[0].shape)

    def run(function):
        def both(operands, grad):
            out, adjoint = jax.vjp(lambda *a: function(config, *a), *operands)
            return out, *adjoint(grad)

        return jax.jit(both)(operands, grad)

    names = ["out", "query", "keys", "values", "rel", "proj"]
    for name, ours, definition in zip(names, run(attend_sequence), run(_attend_everything), strict=True):
        scale = max(float(jnp.linalg.norm(definition)), 1.0)  # a gradient may be zero
        assert float(jnp.linalg.norm(ours - definition)) / scale < 5e-6, name


@pytest.mark.parametrize(("window", "pinned"), [(512, 0), (16_384, 8), (32_768, 0)])
def test_a_long_sequence_never_has_all_logits_or_all_biases_in_memory(window, pinned):
    """Compiled for 32,768 tokens, forward and backward: 0.13 GB. The logits of two heads alone would take 8.6 GB."""
    tokens, heads, dim = 32_768, 2, 16
    config = AttentionConfig(heads, 1, dim, window=window, rel_extent=1024, pinned=pinned)
    shapes = [(1, tokens, 1, heads, dim), (1, tokens, 1, dim), (1, tokens, 1, dim), (1, tokens, 1, heads, 4), (4, 1024)]

    def loss(*operands):
        return attend_sequence(config, *operands).sum()

    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, range(5))).lower(*operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 150e6
