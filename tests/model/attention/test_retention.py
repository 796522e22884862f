"""Global layers see the text of micro-turns that have long left the window, in whole sequences of any length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import AttentionConfig
from jaxtml.model.attention import sequence
from jaxtml.model.attention.retention import find_far_tokens
from jaxtml.model.attention.sequence import attend_sequence
from tests.model.attention.talks import random_kinds, visible_tokens

BATCH, GROUPS, PER_GROUP, DIM, RANK, TOKENS = 3, 2, 3, 8, 4, 300
DENSITIES = (0.0, 0.3, 0.9)  # how often the micro-turns of each row have text
CONFIGS = {
    "many": AttentionConfig(6, 2, 8, window=40, rel_extent=40, pinned=5, retained=70),
    "few": AttentionConfig(6, 2, 8, window=40, rel_extent=20, retained=7),
    "more than there are": AttentionConfig(6, 2, 8, window=64, rel_extent=20, pinned=3, retained=1000),
    "longer than most of the sequence": AttentionConfig(6, 2, 8, window=290, rel_extent=20, pinned=3, retained=9),
}


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


@pytest.fixture(scope="module")
def kinds() -> np.ndarray:
    return np.stack([random_kinds(row, TOKENS, density) for row, density in enumerate(DENSITIES)])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_list_of_far_tokens_says_what_the_rule_says_in_words(kinds, name):
    config = CONFIGS[name]
    far = find_far_tokens(config, jnp.asarray(kinds))
    assert far is not None
    for row, kind in enumerate(kinds):
        position, end = np.asarray(far.position[row]), np.asarray(far.end[row])
        entry, query = np.arange(len(position)), np.arange(TOKENS)[:, None]
        listed = (entry < config.pinned) | ((entry >= end[:, None] - config.retained) & (entry < end[:, None]))
        seen = (query >= np.arange(TOKENS)) & (query - np.arange(TOKENS) < config.window)
        for q, f in zip(*np.nonzero(listed & (position <= query - config.window)), strict=True):
            assert not seen[q, position[f]], "a token is visible twice"
            seen[q, position[f]] = True
        np.testing.assert_array_equal(seen, visible_tokens(config, kind))


@pytest.mark.parametrize(
    ("name", "max_chunks"), [*((name, 0) for name in CONFIGS), ("many", 6), ("longer than most of the sequence", 6)]
)
def test_attention_equals_one_masked_softmax_forwards_and_backwards(kinds, name, max_chunks, monkeypatch):
    """In up to `max_chunks` chunks, or block by block."""
    monkeypatch.setattr(sequence, "CHUNK", 50)
    monkeypatch.setattr(sequence, "MAX_UNROLLED_CHUNKS", max_chunks)
    monkeypatch.setattr(sequence, "BLOCK", 32)
    config = CONFIGS[name]
    operands = (
        draw(BATCH, TOKENS, GROUPS, PER_GROUP, DIM),
        draw(BATCH, TOKENS, GROUPS, DIM),
        2 * draw(BATCH, TOKENS, GROUPS, DIM),
        draw(BATCH, TOKENS, GROUPS, PER_GROUP, RANK),
        draw(RANK, config.rel_extent),
    )
    visible = np.stack([visible_tokens(config, kind) for kind in kinds])[:, None, None]
    distance = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
    inside = (distance >= 0) & (distance < config.rel_extent)

    def ours(query, keys, values, rel, proj):
        return attend_sequence(
            config, query, keys, values, rel, proj, None, find_far_tokens(config, jnp.asarray(kinds))
        )

    def definition(query, keys, values, rel, proj):
        profile = (rel @ proj).transpose(0, 2, 3, 1, 4)
        index = np.broadcast_to(np.clip(distance, 0, config.rel_extent - 1), (*profile.shape[:-1], TOKENS))
        bias = jnp.where(inside, jnp.take_along_axis(profile, index, axis=-1), 0)
        logits = jnp.einsum("bigqk,bjgk->bgqij", query, keys) + bias
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        return jnp.einsum("bgqij,bjgk->bigqk", weights, values)

    grad = draw(*operands[0].shape) + 1

    def run(function):
        def both(operands, grad):
            out, adjoint = jax.vjp(function, *operands)
            return out, *adjoint(grad)

        return jax.jit(both)(operands, grad)

    names = ["out", "query", "keys", "values", "rel", "proj"]
    for part, a, b in zip(names, run(ours), run(definition), strict=True):
        assert float(jnp.linalg.norm(a - b)) / float(jnp.linalg.norm(b)) < 5e-6, part


def test_a_long_sequence_never_has_all_logits_in_memory():
    """Compiled for 32,768 tokens, forward and backward: 0.07 GB. The logits of two heads alone would take 8.6 GB."""
    tokens, config = 32_768, AttentionConfig(2, 1, 16, window=2048, rel_extent=1024, pinned=64, retained=4096)
    shapes = [(1, tokens, 1, 2, 16), (1, tokens, 1, 16), (1, tokens, 1, 16), (1, tokens, 1, 2, 4), (4, 1024)]

    def loss(kind, *operands):
        return attend_sequence(config, *operands, None, find_far_tokens(config, kind)).sum()

    kind = jax.ShapeDtypeStruct((1, tokens), jnp.uint8)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, range(1, 6))).lower(kind, *operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100e6


@pytest.mark.parametrize("pinned", [0, 5])
def test_the_kernels_equal_plain_attention_forwards_and_backwards(pinned, monkeypatch):
    """Interpreted, in blocks of 128. Queries skip most blocks of the list; the rows skip different ones."""
    monkeypatch.setattr(sequence, "BLOCK", 128)
    tokens = 450
    config = AttentionConfig(4, 2, 16, window=100, rel_extent=90, pinned=pinned, retained=60)
    kind = jnp.asarray(np.stack([random_kinds(row, tokens, density) for row, density in enumerate(DENSITIES)]))
    far = find_far_tokens(config, kind)
    keys, rel = (BATCH, 2, tokens, 16), (BATCH, 2, 2, tokens, 4)
    shapes = [(BATCH, 2, 2, tokens, 16), keys, keys, rel, (4, config.rel_extent)]
    operands = [0.5 * draw(*shape) for shape in shapes]
    scale = 1 + 0.1 * jnp.abs(draw(tokens))
    grad = draw(*shapes[0]) + 1

    def run(function):
        def both(operands, grad):
            out, adjoint = jax.vjp(lambda *a: function(config, sequence.Operands(*a, scale, far)), *operands)
            return out, *adjoint(grad)

        return jax.jit(both)(operands, grad)

    kernels, plain = run(partial(sequence.attend_flash, interpret=True)), run(sequence.attend_chunks)
    for part, a, b in zip(["out", "query", "keys", "values", "rel", "proj"], kernels, plain, strict=True):
        assert float(jnp.linalg.norm(a - b)) / float(jnp.linalg.norm(b)) < 5e-6, part
