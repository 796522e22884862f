"""SwiGLU of many experts over rows that are sorted by expert: one function, implemented for each platform.

Axes: R rows of the buffer, D model width, F expert width, E experts of this device, G blocks of rows. Called by `local`
and `transports`.

| platform | implementation | reason |
|---|---|---|
| cpu and others | a loop over blocks of rows, adjoint written out | a block and an expert stay in a core's cache |
| tpu, training | megablox `gmm` (sizes in multiples of 128) | XLA's `ragged_dot` is dense on v5e, v6e and tpu7x |
| tpu, serving | `kernel` (sizes in multiples of 128) | reads experts where they are in the stack, also as int8 |
| cuda, training | tokamax `ragged_dot`, if installed | XLA's `ragged_dot` writes the rows once for every expert |
| cuda, serving | `kernel`, as on a TPU | as on a TPU |

`jax.lax.ragged_dot` is the reference. A TPU also uses it for sizes that the kernels do not take.
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

_MEGABLOX_TILE = 512  # the largest tile of megablox along both axes of the weights


def grouped_swiglu(
    rows: jax.Array, sizes: jax.Array, experts: ExpertWeights, block: int, expected: int | None = None
) -> jax.Array:
    """Applies to each row the expert of its group.

    Args:
      rows: `[R, D]`, the group of expert 0, then that of expert 1, and so on; R is a multiple of `block`.
      sizes: `[E]` int32, the rows of each group, padding included: multiples of `block`, at most R together.
      experts: of this device.
      block: the groups are padded to multiples of this number.
      expected: the rows in use when the load is even, for cost estimates; None: all.

    Returns:
      `[R, D]`; rows after the last group may hold anything.
    """

    def on_layer(swiglu: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Cuts the layer out of the stack, for implementations that take the weights of one layer."""
        return lambda rows, sizes, experts: swiglu(rows, sizes, *experts.layer(rows.dtype))

    tpu = on_layer(_swiglu_ragged_dot)
    in_place = partial(_swiglu_in_place, block=block, expected=len(rows) if expected is None else expected)
    if experts.in_place:
        tpu = partial(in_place, platform="tpu")
    elif all(size % TPU_LANES == 0 for size in (block, *experts.w2.shape[-2:])):
        tpu = on_layer(partial(_swiglu_megablox, block=block))
    blocks = on_layer(partial(_swiglu_blocks, block=block))
    # To count the FLOPs of a program for GPUs, `jaxtml plan` traces it while the default device is a CPU. The branch
    # for GPUs is then `ragged_dot`. The FLOPs of `_swiglu_blocks` could not be counted, because the number of rounds
    # of its loop is not known.
    cuda = on_layer(_swiglu_ragged_dot)
    if experts.in_place_on_gpu:
        cuda = partial(in_place, platform="cuda")
    elif _traces_for_gpu():
        cuda = on_layer(_swiglu_tokamax) if importlib.util.find_spec("tokamax") else blocks
        if cuda is blocks:
            logging.log_first_n(logging.WARNING, "the experts run a loop that is slow on a GPU: pip install tokamax", 1)
    return jax.lax.platform_dependent(rows, sizes, experts, tpu=tpu, cuda=cuda, default=blocks)


def _traces_for_gpu() -> bool:
    """Returns whether programs are traced for a GPU; tokamax refuses to be traced for other platforms.

    The GPU need not be present: the default device may be only the description of a GPU.
    """
    return jax.extend.backend.get_default_device().platform in ("gpu", "cuda")


def _swiglu_tokamax(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """For GPUs in training."""
    import tokamax

    # Tokamax' other implementation, Mosaic, has no backward pass on Blackwell.
    multiply = partial(tokamax.ragged_dot, group_sizes=sizes, implementation="triton")
    gate, up = (multiply(rows, w13[:, half]) for half in (0, 1))
    return multiply(jax.nn.silu(gate) * up, w2)


def _swiglu_ragged_dot(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """The reference, by XLA."""
    gate, up = (jax.lax.ragged_dot(rows, w13[:, half], sizes) for half in (0, 1))
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w2, sizes)


def _swiglu_in_place(
    rows: jax.Array,
    sizes: jax.Array,
    experts: ExpertWeights,
    block: int,
    expected: int,
    platform: str,
    interpret: bool = False,
) -> jax.Array:
    """For serving on TPUs and GPUs: reads the experts where they are in the stack."""
    from jaxtml.model.experts.kernel import grouped_matmul  # importing Pallas takes a second

    owner, used = _block_owners(sizes, len(rows), block)
    options = (experts.layer_index, expected, platform, interpret)
    hidden = grouped_matmul(rows, owner, used, experts.w13, experts.scale13, *options)
    scale2 = None if experts.scale2 is None else experts.scale2[..., None, :]
    return grouped_matmul(hidden, owner, used, experts.w2[..., None, :, :], scale2, *options)


def _swiglu_megablox(
    rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array, block: int, interpret: bool = False
) -> jax.Array:
    """For TPUs in training."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # the import takes two seconds

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        tiling = (block, min(_MEGABLOX_TILE, w.shape[1]), min(_MEGABLOX_TILE, w.shape[2]))
        return gmm(x, w, sizes, x.dtype, tiling, None, None, False, interpret)

    gate, up = (multiply(rows, w13[:, half]) for half in (0, 1))
    return multiply(jax.nn.silu(gate) * up, w2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu_blocks(rows: jax.Array, sizes: jax.Array, w13: jax.Array, w2: jax.Array, block: int) -> jax.Array:
    """For CPUs: a loop with one round per block in use. A buffer for the worst case costs memory but no time.

    The adjoint sums the weight gradients in place. This takes half the time of a batched matmul over gathered copies of
    the weights.
    """
    return _swiglu_blocks_fwd(rows, sizes, w13, w2, block)[0]


def _block_owners(sizes: jax.Array, rows: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the expert of each of the `rows // block` blocks, `[G]` int32, and how many blocks are in use."""
    end = jnp.cumsum(sizes // block)
    owner = jnp.searchsorted(end, jnp.arange(rows // block), side="right")
    return jnp.minimum(owner, len(sizes) - 1).astype(jnp.int32), end[-1]


def _swiglu_blocks_fwd(rows, sizes, w13, w2, block):
    total, dim = rows.shape
    width = w2.shape[1]
    owner, count = _block_owners(sizes, total, block)

    def run_block(i, buffers):
        x, e = jax.lax.dynamic_slice_in_dim(rows, i * block, block), owner[i]
        gate, up = x @ w13[e, 0], x @ w13[e, 1]
        parts = ((jax.nn.silu(gate) * up) @ w2[e], gate, up)
        return tuple(_write_rows(buffer, part, i * block) for buffer, part in zip(buffers, parts, strict=True))

    empty = tuple(jnp.zeros((total, n), rows.dtype) for n in (dim, width, width))
    out, gate, up = jax.lax.fori_loop(0, count, run_block, empty)
    return out, (rows, gate, up, sizes, w13, w2)


def _swiglu_blocks_bwd(block, residuals, grad):
    rows, gate, up, sizes, w13, w2 = residuals
    owner, count = _block_owners(sizes, rows.shape[0], block)
    w1, w3 = jax.lax.optimization_barrier((w13[:, 0], w13[:, 1]))

    def differentiate_block(i, carry):
        dx, *sums = carry
        x, a, b, g = (jax.lax.dynamic_slice_in_dim(v, i * block, block) for v in (rows, gate, up, grad))
        e = owner[i]
        part, *parts = swiglu_grad(x, a, b, w1[e], w3[e], w2[e], g)
        return _write_rows(dx, part, i * block), *(s.at[e].add(p) for s, p in zip(sums, parts, strict=True))

    empty = (jnp.zeros_like(rows), jnp.zeros_like(w1), jnp.zeros_like(w3), jnp.zeros_like(w2))
    dx, dw1, dw3, dw2 = jax.lax.fori_loop(0, count, differentiate_block, empty)
    return dx, None, jnp.stack([dw1, dw3], axis=1), dw2


_swiglu_blocks.defvjp(_swiglu_blocks_fwd, _swiglu_blocks_bwd)


def _write_rows(buffer: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Returns `buffer` with `part` written over its rows from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, part.astype(buffer.dtype), start, axis=0)
