"""Attention of whole sequences in blocks: only keys that a window can reach, the relative bias as a matmul.

Axes: B batch, G key/value heads, Q query heads of a group, T tokens, C queries of a chunk, N chunks side by side, S
keys that a chunk sees, K head width, R width of the relative state, E relative extent, L <= S keys that a bias can
reach.

Called by `attention` in training and for checks; decoding has its own path there. A TPU runs the kernels of `flash`;
what stands here is for everything else. The adjoint is written out, with the exponentials of the forward pass saved: on
a CPU that takes a third of the time of what XLA derives.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.blockwise import attend_blocks, plan
from jaxtml.model.numerics import MASKED_LOGIT, einsum_float32

FLASH_FROM = 512  # tokens of a sequence for which a TPU runs the kernels; below, a program is small either way
CHUNK = 128  # queries per chunk
BODIES = 16  # chunks that a program spells out, at most: beyond, it goes from block to block
BLOCK = 512  # tokens of such a block


class _Given(NamedTuple):
    """What attention works on: `query`, `rel` `[B, G, Q, T, .]`, `keys`, `values` `[B, G, T, K]`, `proj`, `scale`."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array
    rel: jax.Array
    proj: jax.Array
    scale: jax.Array


def attend_sequence(
    config: AttentionConfig,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rel: jax.Array,
    proj: jax.Array,
    scale: jax.Array | None = None,
) -> jax.Array:
    """Causal attention over a whole sequence.

    Args:
      config: window, pinned tokens, relative extent.
      query: `[B, T, G, Q, K]`.
      keys: `[B, T, G, K]`; `values` likewise.
      rel: `[B, T, G, Q, R]`, mixes the rows of `proj` `[R, E]` into one bias per distance.
      scale: `[T]` float32, factor of each query's logits; None: 1.

    Returns:
      `[B, T, G, Q, K]`.
    """
    query, rel = (a.transpose(0, 2, 3, 1, 4) for a in (query, rel))  # [B, G, Q, T, .]
    keys, values = (a.transpose(0, 2, 1, 3) for a in (keys, values))  # [B, G, T, K]
    tokens = query.shape[3]
    given = _Given(query, keys, values, rel, proj, jnp.ones(tokens) if scale is None else scale)
    if tokens < FLASH_FROM or (config.pinned and config.window < tokens):  # the kernels know no pinned tokens
        out = _chunked(config, given)
    else:
        out = jax.lax.platform_dependent(given, tpu=partial(_kernels, config), default=partial(_chunked, config))
    return out.transpose(0, 3, 1, 2, 4)


def _kernels(config: AttentionConfig, given: _Given) -> jax.Array:
    from jaxtml.model.attention.flash import flash_attention  # Pallas: a second, which no program without it should pay

    batch, groups, per_group, tokens, _ = given.query.shape
    query, rel = (a.reshape(batch, groups * per_group, tokens, -1) for a in (given.query, given.rel))
    segments = jnp.zeros((batch, tokens), jnp.int32)
    out = flash_attention(query, given.keys, given.values, rel, given.proj, given.scale, segments, window=config.window)
    return out.reshape(given.query.shape)


def _chunked(config: AttentionConfig, given: _Given) -> jax.Array:
    query, rel = (a * given.scale[:, None].astype(a.dtype) for a in (given.query, given.rel))
    query, keys, values, rel = jax.lax.optimization_barrier((query, given.keys, given.values, rel))
    tokens = query.shape[3]
    run = _one_by_one
    if tokens > BODIES * CHUNK:
        run = _block_by_block
    elif not config.pinned and config.window + _chunk(config) <= tokens:
        run = _side_by_side
    return run(config, query, keys, values, rel, given.proj)


def _chunk(config: AttentionConfig) -> int:
    """Queries per chunk of a short window: no more than the window itself, in sixteens."""
    return min(CHUNK, -(-config.window // 16) * 16)


def _side_by_side(
    config: AttentionConfig, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, proj: jax.Array
) -> jax.Array:
    """Short windows: every chunk sees itself and as many chunks before it as the window needs, all in one matmul."""
    batch, groups, per_group, tokens, _ = query.shape
    chunk = _chunk(config)
    count = -(-tokens // chunk)
    before = -(-(config.window - 1) // chunk)
    pad = count * chunk - tokens
    query, rel = (jnp.pad(a, [(0, 0)] * 3 + [(0, pad), (0, 0)]) for a in (query, rel))

    def split(a: jax.Array) -> jax.Array:  # [B, G, Q, T, .] -> [B, G, N, Q, C, .]
        return a.reshape(batch, groups, per_group, count, chunk, -1).transpose(0, 1, 3, 2, 4, 5)

    def near(a: jax.Array) -> jax.Array:  # [B, G, T, K] -> [B, G, N, S, K]
        a = jnp.pad(a, ((0, 0), (0, 0), (before * chunk, pad), (0, 0)))
        a = a.reshape(batch, groups, before + count, chunk, -1)
        return jnp.concatenate([a[:, :, i : i + count] for i in range(before + 1)], axis=3)

    reach = (before + 1) * chunk
    distance = np.arange(chunk)[:, None] + before * chunk - np.arange(reach)
    visible = (distance >= 0) & (distance < config.window)
    begun = (np.arange(count)[:, None] - before) * chunk + np.arange(reach) >= 0  # [N, S]
    mask = np.where(visible & begun[:, None, None], 0.0, MASKED_LOGIT).astype(np.float32)
    table = bias_table(proj, chunk, reach)
    out = attend_block(split(query), near(keys), near(values), split(rel), table, jnp.asarray(mask))
    out = out.transpose(0, 1, 3, 2, 4, 5).reshape(batch, groups, per_group, count * chunk, -1)
    return out[..., :tokens, :]


def _one_by_one(
    config: AttentionConfig, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, proj: jax.Array
) -> jax.Array:
    """Long windows: a chunk sees the keys of its reach and none after itself, so each has its own number of keys."""
    tokens = query.shape[3]
    extent = config.rel_extent
    table = bias_table(proj, CHUNK, min(tokens, extent) + CHUNK)
    outs = []
    for start in range(0, tokens, CHUNK):
        stop = min(start + CHUNK, tokens)
        low = max(0, start - max(config.window, extent) + 1)  # pinned keys before this lie beyond the extent
        pins = min(config.pinned, low)
        position = np.concatenate([np.arange(pins), np.arange(low, stop)])
        distance = np.arange(start, stop)[:, None] - position
        visible = (distance >= 0) & ((distance < config.window) | (position < config.pinned))
        mask = jnp.asarray(np.where(visible, 0.0, MASKED_LOGIT).astype(np.float32)[None, None])
        # The table's last column is the own key of its last query; a shorter last chunk ends earlier.
        end = table.shape[2] - (CHUNK - (stop - start))
        bias = table[: stop - start, :, max(0, end - (stop - low)) : end]

        def reach(a: jax.Array, low: int = low, stop: int = stop, pins: int = pins) -> jax.Array:
            near = a[:, :, low:stop]
            return (jnp.concatenate([a[:, :, :pins], near], axis=2) if pins else near)[:, :, None]

        def part(a: jax.Array, start: int = start, stop: int = stop) -> jax.Array:
            return a[:, :, None, :, start:stop]

        outs.append(attend_block(part(query), reach(keys), reach(values), part(rel), bias, mask))
    return jnp.concatenate(outs, axis=4)[:, :, 0]


def _block_by_block(
    config: AttentionConfig, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, proj: jax.Array
) -> jax.Array:
    """Long sequences: as much memory as a few blocks of logits take."""
    tokens = query.shape[3]
    blocks = plan(config, tokens, BLOCK)
    pad = blocks.count * BLOCK - tokens
    query, rel = (jnp.pad(a, [(0, 0)] * 3 + [(0, pad), (0, 0)]) for a in (query, rel))
    keys, values = (jnp.pad(a, [(0, 0)] * 2 + [(0, pad), (0, 0)]) for a in (keys, values))
    table = bias_table(proj, BLOCK, blocks.biased * BLOCK)
    out: jax.Array = attend_blocks(blocks, query, keys, values, rel, table)  # pyright: ignore[reportAssignmentType]
    return out[..., :tokens, :]


def bias_table(proj: jax.Array, chunk: int, keys: int) -> jax.Array:
    """Bias profiles by query and key, `[C, R, keys]`: `proj[r, d]`, key j being d = i + keys - C - j before query i.

    Zero outside `[0, E)`. The last key is the last query's own. A profile turned round, repeated with one element more
    than a row holds and read row by row stands one further to the right in each: no gather (after Huang et al., 2018).
    """
    rank, extent = proj.shape
    width = keys + chunk - 1  # row i is columns [C - 1 - i, ...) of a line in which distance 0 is column keys - 1
    kept = min(extent, keys)
    line = jnp.pad(proj[:, :kept][:, ::-1], ((0, 0), (keys - kept, chunk)))
    rows = jnp.tile(line, (1, chunk))[:, : chunk * width].reshape(rank, chunk, width)
    return rows[:, :, chunk - 1 :].transpose(1, 0, 2)


class _Saved(NamedTuple):
    query: jax.Array
    keys: jax.Array
    values: jax.Array
    rel: jax.Array
    table: jax.Array
    exponentials: jax.Array
    total: jax.Array
    out: jax.Array


@jax.custom_vjp
def attend_block(
    query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, table: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention of chunks over the keys they see.

    Args:
      query: `[B, G, N, Q, C, K]`.
      keys: `[B, G, N, S, K]`; `values` likewise.
      rel: `[B, G, N, Q, C, R]`.
      table: `[C, R, L]`, from `bias_table`, for the last L of the S keys.
      mask: `[N or 1, 1, C, S]` float32, 0 or `MASKED_LOGIT`.

    Returns:
      `[B, G, N, Q, C, K]`.
    """
    return _attend_fwd(query, keys, values, rel, table, mask)[0]


def _attend_fwd(query, keys, values, rel, table, mask):
    shape = (*query.shape[:-1], keys.shape[3])  # [B, G, N, Q, C, S]
    logits = einsum_float32("bgnik,bgnjk->bgnij", _flat(query), keys).reshape(shape)
    bias = jnp.moveaxis(einsum_float32("cbgnqr,crl->cbgnql", jnp.moveaxis(rel, 4, 0), table), 0, 4)
    far = shape[-1] - table.shape[-1]
    logits = logits + (jnp.pad(bias, [(0, 0)] * 5 + [(far, 0)]) if far else bias) + mask
    exponentials = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(query.dtype)
    out = einsum_float32("bgnij,bgnjk->bgnik", _flat(exponentials), values).reshape(query.shape) / total
    out = out.astype(query.dtype)
    return out, _Saved(query, keys, values, rel, table, exponentials, total, out)


def _attend_bwd(saved, grad):
    query, keys, values, rel, table, exponentials, total, out = saved
    dtype = query.dtype
    # Weights are exponentials / total; the division goes into the incoming gradient, which is smaller.
    grad = jax.lax.optimization_barrier((grad / total).astype(dtype))
    mean = (grad.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    dweights = einsum_float32("bgnik,bgnjk->bgnij", _flat(grad), values)
    dlogits = (_flat(exponentials) * (dweights - _flat(mean))).astype(dtype)
    dlogits = jax.lax.optimization_barrier(dlogits)
    dquery = einsum_float32("bgnij,bgnjk->bgnik", dlogits, keys).reshape(query.shape)
    # [K, S] first: the matmul then runs along rows of what is long
    dkeys = einsum_float32("bgnik,bgnij->bgnkj", _flat(query), dlogits).swapaxes(3, 4)
    dvalues = einsum_float32("bgnik,bgnij->bgnkj", _flat(grad), _flat(exponentials)).swapaxes(3, 4)
    near = dlogits.reshape(exponentials.shape)[..., exponentials.shape[-1] - table.shape[-1] :]
    near = jax.lax.optimization_barrier(jnp.moveaxis(near, 4, 0))
    drel = jnp.moveaxis(einsum_float32("cbgnql,crl->cbgnqr", near, table), 0, 4)
    dtable = einsum_float32("cbgnqr,cbgnql->crl", jnp.moveaxis(rel, 4, 0), near)
    grads = (dquery, dkeys, dvalues, drel, dtable)
    return (*jax.lax.optimization_barrier(tuple(g.astype(dtype) for g in grads)), None)


attend_block.defvjp(_attend_fwd, _attend_bwd)


def _flat(a: jax.Array) -> jax.Array:
    """`[B, G, N, Q, C, .]` -> `[B, G, N, Q C, .]`: the queries of a group share their keys, one matmul serves them."""
    return a.reshape(*a.shape[:3], -1, a.shape[-1])
