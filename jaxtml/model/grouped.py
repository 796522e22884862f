"""SwiGLU of many experts over rows that are sorted by expert: one function, written for each platform.

| platform | how | why |
|---|---|---|
| cpu | a loop over blocks of rows, the adjoint written out | a block and one expert's weights stay in a core's cache |
| tpu | megablox `gmm` (sizes in multiples of 128) | XLA's `ragged_dot` is dense on v5e, v6e and tpu7x |
| others | `jax.lax.ragged_dot` | the reference |

Axes: R rows of the buffer, D model width, F expert width, E experts of this device, G blocks of rows. Called by `moe`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxtml.model.layers import swiglu_grad

TILE = 512  # edge of megablox' tiles, rows aside
LANES = 128  # its kernels take no other multiples


def expert_rows(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array, block: int) -> jax.Array:
    """Each row through the expert of its group.

    Args:
      rows: `[R, D]`: expert 0's group, then expert 1's, ... ; R is a multiple of `block`.
      sizes: `[E]` int32 rows of each group, padding included: multiples of `block`, at most R in all.
      w13: `[E, D, 2, F]`, gate and up.
      w2: `[E, F, D]`.
      block: what groups are padded to.

    Returns:
      `[R, D]`; rows behind the last group hold anything.
    """
    whole = all(size % LANES == 0 for size in (block, w2.shape[1], w2.shape[2]))
    return jax.lax.platform_dependent(
        rows,
        sizes,
        w13,
        w2,
        cpu=partial(_blocks, block=block),
        tpu=partial(_megablox, block=block) if whole else _ragged_dot,
        default=_ragged_dot,
    )


def _ragged_dot(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    experts, dim, _, width = w13.shape
    both = jax.lax.ragged_dot(rows, w13.reshape(experts, dim, 2 * width), sizes)
    return jax.lax.ragged_dot(jax.nn.silu(both[:, :width]) * both[:, width:], w2, sizes)


def _megablox(
    rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array, block: int, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # two seconds, which only a TPU program pays

    experts, dim, _, width = w13.shape

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        tiling = (block, min(TILE, w.shape[1]), min(TILE, w.shape[2]))
        return gmm(x, w, sizes, x.dtype, tiling, None, None, False, interpret)

    both = multiply(rows, w13.reshape(experts, dim, 2 * width))
    return multiply(jax.nn.silu(both[:, :width]) * both[:, width:], w2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array, block: int) -> jax.Array:
    """As many rounds as there are blocks in use: a buffer for the worst case costs memory, no time.

    The weight gradients are summed in place: half the time of a batched matmul over gathered copies of the weights.
    """
    return _blocks_fwd(rows, sizes, w13, w2, block)[0]


def _owners(sizes: jax.Array, rows: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The expert of each block `[G]`, and how many blocks are in use."""
    end = jnp.cumsum(sizes // block)
    owner = jnp.searchsorted(end, jnp.arange(rows // block), side="right")
    return jnp.minimum(owner, len(sizes) - 1).astype(jnp.int32), end[-1]


def _blocks_fwd(rows, sizes, w13, w2, block):
    total, dim = rows.shape
    width = w2.shape[1]
    owner, count = _owners(sizes, total, block)
    w1, w3 = jax.lax.optimization_barrier((w13[:, :, 0], w13[:, :, 1]))

    def one(i, buffers):
        x, e = jax.lax.dynamic_slice_in_dim(rows, i * block, block), owner[i]
        gate, up = x @ w1[e], x @ w3[e]
        parts = ((jax.nn.silu(gate) * up) @ w2[e], gate, up)
        return tuple(_put(buffer, part, i * block) for buffer, part in zip(buffers, parts, strict=True))

    empty = tuple(jnp.zeros((total, n), rows.dtype) for n in (dim, width, width))
    out, gate, up = jax.lax.fori_loop(0, count, one, empty)
    return out, (rows, gate, up, sizes, w13, w2)


def _blocks_bwd(block, saved, grad):
    rows, gate, up, sizes, w13, w2 = saved
    owner, count = _owners(sizes, rows.shape[0], block)
    w1, w3 = jax.lax.optimization_barrier((w13[:, :, 0], w13[:, :, 1]))

    def one(i, carry):
        dx, *sums = carry
        x, a, b, g = (jax.lax.dynamic_slice_in_dim(v, i * block, block) for v in (rows, gate, up, grad))
        e = owner[i]
        part, *parts = swiglu_grad(x, a, b, w1[e], w3[e], w2[e], g)
        return _put(dx, part, i * block), *(s.at[e].add(p) for s, p in zip(sums, parts, strict=True))

    empty = (jnp.zeros_like(rows), jnp.zeros_like(w1), jnp.zeros_like(w3), jnp.zeros_like(w2))
    dx, dw1, dw3, dw2 = jax.lax.fori_loop(0, count, one, empty)
    return dx, None, jnp.stack([dw1, dw3], axis=2), dw2


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _put(buffer: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, part.astype(buffer.dtype), start, axis=0)
