"""Attention of whole sequences: only keys within the window, and the relative bias as a matmul.

Axes: B batch, G key/value heads, Q query heads per key/value head, T tokens, C queries of a chunk, N chunks side by
side, S keys that a chunk sees, K head width, R width of the relative state, E relative extent, L <= S keys that a bias
can reach.

Called by `attention`, in training and in checks; decoding is in `cache`. A TPU runs the kernels of `flash` where they
apply. This file is for everything else: short windows in one matmul, long windows chunk by chunk, and long sequences
block by block (`blockwise`). Layers that retain tokens attend separately to the tokens beyond the window (`retention`,
`far_blocks`), and the two results are joined.

The adjoint is written out and uses the exponentials that the forward pass saves. On a CPU it takes a third of the time
of the adjoint that XLA derives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.config import AttentionConfig
from jaxtml.model.attention.blockwise import attend_blocks, plan_blocks
from jaxtml.model.attention.far_blocks import FarPlan, attend_far_blocks, pad_far_tokens, plan_far_blocks
from jaxtml.model.attention.retention import FarTokens
from jaxtml.model.numerics import MASKED_LOGIT, einsum_float32

# From this length on, a TPU runs the kernels. Shorter sequences need little time and memory without them.
MIN_FLASH_TOKENS = 512
CHUNK = 128  # queries of a chunk
MAX_UNROLLED_CHUNKS = 16  # a program has separate code for up to 16 chunks; longer sequences run block by block
BLOCK = 512  # tokens of a block


Attended = tuple[jax.Array, jax.Array]
"""Attention `[..., T, K]`, and the logarithm of each query's softmax sum, `[..., T]` float32."""


class Operands(NamedTuple):
    """The operands of attention, heads before tokens.

    Attributes:
      query: `[B, G, Q, T, K]`.
      keys, values: `[B, G, T, K]`.
      rel: `[B, G, Q, T, R]`.
      proj: `[R, E]`.
      scale: `[T]` float32.
      far: the tokens that are visible beyond the window; None: the pinned tokens alone.
    """

    query: jax.Array
    keys: jax.Array
    values: jax.Array
    rel: jax.Array
    proj: jax.Array
    scale: jax.Array
    far: FarTokens | None


def attend_sequence(
    config: AttentionConfig,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rel: jax.Array,
    proj: jax.Array,
    scale: jax.Array | None = None,
    far: FarTokens | None = None,
) -> jax.Array:
    """Computes causal attention over whole sequences.

    Args:
      config: window, pinned tokens, relative extent.
      query: `[B, T, G, Q, K]`.
      keys, values: `[B, T, G, K]`.
      rel: `[B, T, G, Q, R]`, the relative state, which mixes the rows of `proj` into one bias per distance.
      proj: `[R, E]`.
      scale: `[T]` float32, the factor of each query's logits; None: 1.
      far: from `retention.find_far_tokens`; None: no tokens are retained.

    Returns:
      `[B, T, G, Q, K]`.
    """
    query, rel = (a.transpose(0, 2, 3, 1, 4) for a in (query, rel))  # [B, G, Q, T, .]
    keys, values = (a.transpose(0, 2, 1, 3) for a in (keys, values))  # [B, G, T, K]
    tokens = query.shape[3]
    operands = Operands(query, keys, values, rel, proj, jnp.ones(tokens) if scale is None else scale, far)
    # The kernels of `flash` have no pinned tokens. Those of `flash_far` have, and run if tokens are retained.
    has_pinned = config.pinned and config.window < tokens and far is None
    if tokens < MIN_FLASH_TOKENS or has_pinned:
        out = attend_chunks(config, operands)
    else:
        on_tpu, elsewhere = partial(attend_flash, config), partial(attend_chunks, config)
        out = jax.lax.platform_dependent(operands, tpu=on_tpu, default=elsewhere)
    return out.transpose(0, 3, 1, 2, 4)


def attend_flash(config: AttentionConfig, operands: Operands, interpret: bool = False) -> jax.Array:
    """Runs the kernels for TPUs: `[B, G, Q, T, K]`. With `interpret`, they run as plain operations."""
    from jaxtml.model.attention.flash import flash_attention  # importing Pallas takes a second

    batch, groups, per_group, tokens, _ = operands.query.shape
    query, rel = (a.reshape(batch, groups * per_group, tokens, -1) for a in (operands.query, operands.rel))
    segments = jnp.zeros((batch, tokens), jnp.int32)
    _, keys, values, _, proj, scale, far = operands
    near = flash_attention(query, keys, values, rel, proj, scale, segments, window=config.window, interpret=interpret)
    if far is None:
        return near[0].reshape(operands.query.shape)
    from jaxtml.model.attention.flash_far import flash_far_attention

    def attend(plan: FarPlan, query: jax.Array, keys: jax.Array, values: jax.Array, far: FarTokens) -> Any:
        far_scale = jnp.pad(scale[config.window :], (0, query.shape[2] - (tokens - config.window)))
        return flash_far_attention(plan, interpret, query, keys, values, far_scale, far)

    beyond = _attend_far(config, attend, BLOCK, query, keys, values, far)
    return join_far(config.window, near, beyond).reshape(operands.query.shape)


def attend_chunks(config: AttentionConfig, operands: Operands) -> jax.Array:
    """Runs plain operations, in chunks or blocks that suit the window and the length: `[B, G, Q, T, K]`."""
    query, rel = (a * operands.scale[:, None].astype(a.dtype) for a in (operands.query, operands.rel))
    query, keys, values, rel = jax.lax.optimization_barrier((query, operands.keys, operands.values, rel))
    # If there is a list of far tokens, the pinned tokens beyond the window are in it.
    near = config if operands.far is None else dataclasses.replace(config, pinned=0)
    tokens = query.shape[3]
    run = _chunk_by_chunk
    if tokens > MAX_UNROLLED_CHUNKS * CHUNK:
        run = _block_by_block
    elif not near.pinned and config.window + _window_chunk(config) <= tokens:
        run = _all_chunks_at_once
    attended = run(near, query, keys, values, rel, operands.proj)
    if operands.far is None:
        return attended[0]
    size = max(CHUNK, config.pinned) if tokens <= MAX_UNROLLED_CHUNKS * CHUNK else BLOCK  # pinned tokens fit into one
    beyond = _attend_far(config, attend_far_blocks, size, query, keys, values, operands.far)
    return join_far(config.window, attended, beyond)


def _attend_far(
    config: AttentionConfig,
    attend: Callable[..., Any],
    size: int,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    far: FarTokens,
) -> Attended:
    """Attends to pinned and retained tokens beyond the window.

    Args:
      config: window, pinned and retained tokens.
      attend: `attend_far_blocks`, or a function with the same arguments that runs kernels.
      size: tokens of a block, at most.
      query: `[B, ..., T, K]`.
      keys, values: `[B, G, T, K]`.
      far: F far tokens.

    Returns:
      `[B, ..., F, K]` and `[B, ..., F]`: those of the last F queries. The queries before them have no far tokens.
    """
    count = far.position.shape[1]
    plan = plan_far_blocks(config, count, min(size, -(-count // CHUNK) * CHUNK))

    def pad(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, plan.count * plan.size - count), (0, 0)])

    query = pad(query[..., config.window :, :])
    out, lse = attend(plan, query, pad(gather_far(keys, far)), pad(gather_far(values, far)), pad_far_tokens(plan, far))
    return out[..., :count, :], lse[..., :count]


def gather_far(a: jax.Array, far: FarTokens) -> jax.Array:
    """Picks the far tokens out of keys or values: `[B, G, T, K]` -> `[B, G, F, K]`."""
    return jax.vmap(lambda row, position: jnp.take(row, position, axis=1, mode="clip"))(a, far.position)


def join_far(window: int, near: Attended, far: Attended) -> jax.Array:
    """Joins attention within the window and attention to far tokens into one softmax: `[..., T, K]`.

    The softmax over both sets of keys is the mean of the two, weighted by their sums. The first `window` queries have
    no far tokens, and `far` leaves them out.
    """
    (out, lse), (far_out, far_lse) = near, far
    share = jax.nn.sigmoid(far_lse - lse[..., window:])[..., None]
    joined = (1 - share) * out[..., window:, :].astype(jnp.float32) + share * far_out.astype(jnp.float32)
    return jnp.concatenate([out[..., :window, :], joined.astype(out.dtype)], axis=-2)


def _window_chunk(config: AttentionConfig) -> int:
    """Returns the queries of a chunk for a short window: the window rounded up to a multiple of 16, at most `CHUNK`."""
    return min(CHUNK, -(-config.window // 16) * 16)


def _all_chunks_at_once(
    config: AttentionConfig, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, proj: jax.Array
) -> Attended:
    """For short windows: each chunk sees itself and the chunks before it that its window reaches, all in one matmul."""
    batch, groups, per_group, tokens, _ = query.shape
    chunk = _window_chunk(config)
    count = -(-tokens // chunk)
    before = -(-(config.window - 1) // chunk)
    pad = count * chunk - tokens
    query, rel = (jnp.pad(a, [(0, 0)] * 3 + [(0, pad), (0, 0)]) for a in (query, rel))

    def split(a: jax.Array) -> jax.Array:  # [B, G, Q, T, .] -> [B, G, N, Q, C, .]
        return a.reshape(batch, groups, per_group, count, chunk, -1).transpose(0, 1, 3, 2, 4, 5)

    def reachable(a: jax.Array) -> jax.Array:  # [B, G, T, K] -> [B, G, N, S, K]
        a = jnp.pad(a, ((0, 0), (0, 0), (before * chunk, pad), (0, 0)))
        a = a.reshape(batch, groups, before + count, chunk, -1)
        return jnp.concatenate([a[:, :, i : i + count] for i in range(before + 1)], axis=3)

    reach = (before + 1) * chunk
    distance = np.arange(chunk)[:, None] + before * chunk - np.arange(reach)
    visible = (distance >= 0) & (distance < config.window)
    # [N, S]: whether a key belongs to the sequence. The first chunks also have padding before the sequence as keys.
    exists = (np.arange(count)[:, None] - before) * chunk + np.arange(reach) >= 0
    mask = np.where(visible & exists[:, None, None], 0.0, MASKED_LOGIT).astype(np.float32)
    table = bias_table(proj, chunk, reach)
    attended: Any = attend_block(split(query), reachable(keys), reachable(values), split(rel), table, jnp.asarray(mask))

    def join(a: jax.Array) -> jax.Array:  # [B, G, N, Q, C, ...] -> [B, G, Q, T, ...]
        return jnp.moveaxis(a, 2, 3).reshape(batch, groups, per_group, count * chunk, *a.shape[5:])[:, :, :, :tokens]

    return join(attended[0]), join(attended[1])


def _chunk_by_chunk(
    config: AttentionConfig, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, proj: jax.Array
) -> Attended:
    """For long windows: each chunk has its own number of keys, those within its reach and none after the chunk."""
    tokens = query.shape[3]
    extent = config.rel_extent
    table = bias_table(proj, CHUNK, min(tokens, extent) + CHUNK)
    outs: list[Any] = []
    for start in range(0, tokens, CHUNK):
        stop = min(start + CHUNK, tokens)
        low = max(0, start - max(config.window, extent) + 1)  # pinned keys before `low` are beyond the extent
        pins = min(config.pinned, low)
        position = np.concatenate([np.arange(pins), np.arange(low, stop)])
        distance = np.arange(start, stop)[:, None] - position
        visible = (distance >= 0) & ((distance < config.window) | (position < config.pinned))
        mask = jnp.asarray(np.where(visible, 0.0, MASKED_LOGIT).astype(np.float32)[None, None])
        # Row i of the table is for query i of a chunk. The table's last column is the own key of query CHUNK - 1. A
        # shorter chunk ends with an earlier query, and column `end - 1` is the own key of this query.
        end = table.shape[2] - (CHUNK - (stop - start))
        bias = table[: stop - start, :, max(0, end - (stop - low)) : end]

        def reachable(a: jax.Array, low: int = low, stop: int = stop, pins: int = pins) -> jax.Array:
            near = a[:, :, low:stop]
            return (jnp.concatenate([a[:, :, :pins], near], axis=2) if pins else near)[:, :, None]

        def own(a: jax.Array, start: int = start, stop: int = stop) -> jax.Array:
            return a[:, :, None, :, start:stop]

        outs.append(attend_block(own(query), reachable(keys), reachable(values), own(rel), bias, mask))
    out, lse = (jnp.concatenate(parts, axis=4)[:, :, 0] for parts in zip(*outs, strict=True))
    return out, lse


def _block_by_block(
    config: AttentionConfig, query: jax.Array, keys: jax.Array, values: jax.Array, rel: jax.Array, proj: jax.Array
) -> Attended:
    """For long sequences: needs only the memory of a few blocks of logits."""
    tokens = query.shape[3]
    blocks = plan_blocks(config, tokens, BLOCK)
    pad = blocks.count * BLOCK - tokens
    query, rel = (jnp.pad(a, [(0, 0)] * 3 + [(0, pad), (0, 0)]) for a in (query, rel))
    keys, values = (jnp.pad(a, [(0, 0)] * 2 + [(0, pad), (0, 0)]) for a in (keys, values))
    table = bias_table(proj, BLOCK, blocks.bias_distances * BLOCK)
    attended: Any = attend_blocks(blocks, query, keys, values, rel, table)
    return attended[0][:, :, :, :tokens], attended[1][:, :, :, :tokens]


def bias_table(proj: jax.Array, chunk: int, keys: int) -> jax.Array:
    """Returns the rows of `proj` by query and key, `[C, R, keys]`.

    The entry of query i and key j is `proj[:, d]` for the distance d = i + keys - C - j, and zero where d is outside
    `[0, E)`. The last key is the last query's own.

    The function needs no gather (after Huang et al., 2018). Each row of `proj` is reversed and padded to a line of
    `keys + C` elements. The line is repeated, and the repeated line is cut into C rows of `keys + C - 1` elements. A
    row is one element shorter than the line, so the line stands one column further to the right in each next row. The
    last `keys` columns of the rows are the result.

    Args:
      proj: `[R, E]`.
      chunk: C, the number of queries.
      keys: the number of keys.
    """
    rank, extent = proj.shape
    width = keys + chunk - 1  # row i of the result begins at element C - 1 - i of the line; distance 0 is at keys - 1
    kept = min(extent, keys)
    line = jnp.pad(proj[:, :kept][:, ::-1], ((0, 0), (keys - kept, chunk)))
    rows = jnp.tile(line, (1, chunk))[:, : chunk * width].reshape(rank, chunk, width)
    return rows[:, :, chunk - 1 :].transpose(1, 0, 2)


class _Residuals(NamedTuple):
    """What the forward pass of `attend_block` saves for its adjoint."""

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
) -> Attended:
    """Computes softmax attention of chunks over the keys that they see.

    Args:
      query: `[B, G, N, Q, C, K]`, scaled.
      keys, values: `[B, G, N, S, K]`.
      rel: `[B, G, N, Q, C, R]`, scaled.
      table: `[C, R, L]` from `bias_table`, for the last L of the S keys.
      mask: `[N or 1, 1, C, S]` float32: 0, or `MASKED_LOGIT` where a query does not see a key.

    Returns:
      `[B, G, N, Q, C, K]`, and the logarithm of each query's softmax sum, `[B, G, N, Q, C]` float32.
    """
    return _attend_fwd(query, keys, values, rel, table, mask)[0]


def _attend_fwd(query, keys, values, rel, table, mask):
    shape = (*query.shape[:-1], keys.shape[3])  # [B, G, N, Q, C, S]
    logits = einsum_float32("bgnik,bgnjk->bgnij", _flat(query), keys).reshape(shape)
    bias = jnp.moveaxis(einsum_float32("cbgnqr,crl->cbgnql", jnp.moveaxis(rel, 4, 0), table), 0, 4)
    far = shape[-1] - table.shape[-1]
    logits = logits + (jnp.pad(bias, [(0, 0)] * 5 + [(far, 0)]) if far else bias) + mask
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(query.dtype)
    out = einsum_float32("bgnij,bgnjk->bgnik", _flat(exponentials), values).reshape(query.shape) / total
    out = out.astype(query.dtype)
    lse = (largest + jnp.log(total))[..., 0]
    return (out, lse), _Residuals(query, keys, values, rel, table, exponentials, total, out)


def _attend_bwd(residuals, grads):
    query, keys, values, rel, table, exponentials, total, out = residuals
    grad, grad_lse = grads
    dtype = query.dtype
    # The weights are exponentials / total. The incoming gradient is divided instead, because it is smaller.
    grad = jax.lax.optimization_barrier((grad / total).astype(dtype))
    mean = (grad.astype(jnp.float32) * out).sum(axis=-1, keepdims=True) - grad_lse[..., None] / total
    dweights = einsum_float32("bgnik,bgnjk->bgnij", _flat(grad), values)
    dlogits = (_flat(exponentials) * (dweights - _flat(mean))).astype(dtype)
    dlogits = jax.lax.optimization_barrier(dlogits)
    dquery = einsum_float32("bgnij,bgnjk->bgnik", dlogits, keys).reshape(query.shape)
    # These products are computed as [K, S] and then transposed. The matmul then reads the operand with S columns, which
    # is the larger one, row by row.
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
    """`[B, G, N, Q, C, .]` -> `[B, G, N, Q C, .]`: the query heads of a group share keys, so one matmul serves all."""
    return a.reshape(*a.shape[:3], -1, a.shape[-1])
