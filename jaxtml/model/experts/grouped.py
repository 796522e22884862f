"""SwiGLU of many experts over rows that are sorted by expert: one function, written for each platform.

| platform | how | why |
|---|---|---|
| cpu and others | a loop over blocks of rows, the adjoint written out | a block and an expert stay in a core's cache |
| tpu, training | megablox `gmm` (sizes in multiples of 128) | XLA's `ragged_dot` is dense on v5e, v6e and tpu7x |
| tpu, serving | `expert_kernel` (sizes in multiples of 128) | reads an expert where it stands in the stack, int8 too |
| cuda, training | tokamax `ragged_dot`, where it is installed | XLA's writes the rows once for every expert |
| cuda, serving | `expert_kernel`, as on a TPU | as on a TPU |

`jax.lax.ragged_dot` is the reference, and what a TPU gets for sizes that its kernels do not take.

Axes: R rows of the buffer, D model width, F expert width, E experts of this device, G blocks of rows. Called by `moe`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import jax
import jax.extend.backend
import jax.numpy as jnp
from absl import logging

from jaxtml.model.experts.weights import ExpertWeights
from jaxtml.model.layers import swiglu_grad
from jaxtml.parallel.chips import TPU_LANES

TILE = 512  # edge of megablox' tiles, rows aside


def grouped_swiglu(
    rows: jax.Array, sizes: jax.Array, experts: ExpertWeights, block: int, expected: int | None = None
) -> jax.Array:
    """Each row through the expert of its group.

    Args:
      rows: `[R, D]`: expert 0's group, then expert 1's, ... ; R is a multiple of `block`.
      sizes: `[E]` int32 rows of each group, padding included: multiples of `block`, at most R in all.
      experts: of this device.
      block: what groups are padded to.
      expected: rows in use where the load is even; None: all.

    Returns:
      `[R, D]`; rows behind the last group hold anything.
    """

    def on_layer(multiply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda rows, sizes, experts: multiply(rows, sizes, *experts.layer(rows.dtype))

    tpu = on_layer(_ragged_dot)
    in_place = partial(_in_place, block=block, expected=len(rows) if expected is None else expected)
    if experts.in_place:
        tpu = partial(in_place, platform="tpu")
    elif all(size % TPU_LANES == 0 for size in (block, *experts.w2.shape[-2:])):
        tpu = on_layer(partial(_megablox, block=block))
    blocks = on_layer(partial(_blocks, block=block))
    cuda = on_layer(_ragged_dot)  # what a plan counts, traced elsewhere: other loops have no known number of rounds
    if experts.in_place_on_gpu:
        cuda = partial(in_place, platform="cuda")
    elif _for_gpu():
        cuda = on_layer(_tokamax) if importlib.util.find_spec("tokamax") else blocks
        if cuda is blocks:
            logging.log_first_n(logging.WARNING, "experts run a loop made for CPUs: pip install tokamax", 1)
    return jax.lax.platform_dependent(rows, sizes, experts, tpu=tpu, cuda=cuda, default=blocks)


def _for_gpu() -> bool:
    """Whether programs are traced for a GPU, one that is not here included: tokamax refuses all others."""
    return jax.extend.backend.get_default_device().platform in ("gpu", "cuda")


def _tokamax(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    import tokamax

    # Its other implementation, Mosaic, has no backward pass on Blackwell.
    multiply = partial(tokamax.ragged_dot, group_sizes=sizes, implementation="triton")
    gate, up = (multiply(rows, w13[:, half]) for half in (0, 1))
    return multiply(jax.nn.silu(gate) * up, w2)


def _ragged_dot(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    gate, up = (jax.lax.ragged_dot(rows, w13[:, half], sizes) for half in (0, 1))
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w2, sizes)


def _in_place(
    rows: jax.Array,
    sizes: jax.Array,
    experts: ExpertWeights,
    block: int,
    expected: int,
    platform: str,
    interpret: bool = False,
) -> jax.Array:
    from jaxtml.model.experts.kernel import grouped_matmul  # Pallas: a second, which only programs of large models pay

    owner, used = _owners(sizes, len(rows), block)
    last = (experts.at, expected, platform, interpret)
    hidden = grouped_matmul(rows, owner, used, experts.w13, experts.scale13, *last)
    scale2 = None if experts.scale2 is None else experts.scale2[..., None, :]
    return grouped_matmul(hidden, owner, used, experts.w2[..., None, :, :], scale2, *last)


def _megablox(
    rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array, block: int, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # two seconds, which only a TPU program pays

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        tiling = (block, min(TILE, w.shape[1]), min(TILE, w.shape[2]))
        return gmm(x, w, sizes, x.dtype, tiling, None, None, False, interpret)

    gate, up = (multiply(rows, w13[:, half]) for half in (0, 1))
    return multiply(jax.nn.silu(gate) * up, w2)


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

    def one(i, buffers):
        x, e = jax.lax.dynamic_slice_in_dim(rows, i * block, block), owner[i]
        gate, up = x @ w13[e, 0], x @ w13[e, 1]
        parts = ((jax.nn.silu(gate) * up) @ w2[e], gate, up)
        return tuple(_put(buffer, part, i * block) for buffer, part in zip(buffers, parts, strict=True))

    empty = tuple(jnp.zeros((total, n), rows.dtype) for n in (dim, width, width))
    out, gate, up = jax.lax.fori_loop(0, count, one, empty)
    return out, (rows, gate, up, sizes, w13, w2)


def _blocks_bwd(block, saved, grad):
    rows, gate, up, sizes, w13, w2 = saved
    owner, count = _owners(sizes, rows.shape[0], block)
    w1, w3 = jax.lax.optimization_barrier((w13[:, 0], w13[:, 1]))

    def one(i, carry):
        dx, *sums = carry
        x, a, b, g = (jax.lax.dynamic_slice_in_dim(v, i * block, block) for v in (rows, gate, up, grad))
        e = owner[i]
        part, *parts = swiglu_grad(x, a, b, w1[e], w3[e], w2[e], g)
        return _put(dx, part, i * block), *(s.at[e].add(p) for s, p in zip(sums, parts, strict=True))

    empty = (jnp.zeros_like(rows), jnp.zeros_like(w1), jnp.zeros_like(w3), jnp.zeros_like(w2))
    dx, dw1, dw3, dw2 = jax.lax.fori_loop(0, count, one, empty)
    return dx, None, jnp.stack([dw1, dw3], axis=1), dw2


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _put(buffer: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, part.astype(buffer.dtype), start, axis=0)
