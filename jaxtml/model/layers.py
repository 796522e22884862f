"""Small layers of the backbone: RMS norm, matrix product, short convolution and dense feed-forward.

Axes: B batch, T tokens of this call, D model width, C channels of a convolution, W convolution kernel, F feed-forward
width, N rows. Called by `attention`, `experts`, `backbone`, `mtp` and the heads. The released forward pass defines what
these layers compute (Inkling in `transformers`).

Three layers have an adjoint that is written out, with optimisation barriers. Without the barriers, XLA fuses several
operations into one that is slow on a CPU. The docstring of each layer says which operations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtml.model.placement import SINGLE_DEVICE, TENSOR, Placement
from jaxtml.model.spec import Released, linear, normal, ones, param
from jaxtml.parallel.collectives import psum_backward, psum_forward


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last axis; statistics in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float, axis: str = "norm", released: str | None = None):
        self.eps = eps
        self.weight = param((dim,), (axis,), ones, released=Released(released, (dim,)) if released else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalise(x, self.eps) * self.weight[...].astype(x.dtype)


def rms_normalise(x: jax.Array, eps: float) -> jax.Array:
    """Returns `x / rms(x)` over the last axis, in the dtype of `x`; statistics in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


@jax.custom_vjp
def project(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns `x @ w`: `[..., D]` times `[D, F]` gives `[..., F]`.

    The adjoint is written out. XLA would otherwise fold the transpose of the weight gradient into the operation that
    made the incoming gradient. A CPU then reads all of that operation's inputs across their rows: measured, this takes
    20 times as long as the matmul.
    """
    return x @ w


def _project_fwd(x, w):
    return x @ w, (x, w)


def _project_bwd(residuals, grad):
    x, w = residuals
    grad = jax.lax.optimization_barrier(grad)
    return _contract(grad, w, -1, 1), _contract(_flatten_rows(x), _flatten_rows(grad), 0, 0)


project.defvjp(_project_fwd, _project_bwd)


def _flatten_rows(x: jax.Array) -> jax.Array:
    """`[..., D]` -> `[N, D]`."""
    return x.reshape(-1, x.shape[-1])


def _contract(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Returns the matrix product that sums over axis i of `a` and axis j of `b`."""
    return jax.lax.dot_general(a, b, (((i % a.ndim,), (j % b.ndim,)), ((), ())))


class ShortConv(nnx.Module):
    """A causal depthwise convolution over W tokens, plus its input (residual), in float32.

    `weight[W - 1]` multiplies the newest token. A tail holds the inputs before a call, so that a session can be
    continued: W - 1 inputs, and R more, so that the newest tokens can be taken back.
    """

    def __init__(self, channels: int, kernel: int, axis: str, released: str):
        self.kernel = kernel
        self.weight = param(
            (kernel, channels),
            ("conv", axis),
            normal(0.02),
            released=Released(released, (channels, 1, kernel), (1, 0), (channels, kernel)),
        )

    def __call__(
        self, x: jax.Array, tail: jax.Array | None = None, length: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves `x` `[B, T, C]`.

        Args:
          x: the new inputs.
          tail: `[B, W - 1 + R, C]` float32, the inputs just before; zeros where a session begins (None: all zero).
          length: `[B]`, how many of the T tokens are real (real tokens come first); None: all of them.

        Returns:
          `[B, T, C]` in the dtype of `x`, and the tail after the last real token, of the shape of `tail`.
        """
        batch, tokens, channels = x.shape
        past = self.kernel - 1
        if tail is None:
            tail = jnp.zeros((batch, past, channels), jnp.float32)
        kept = tail.shape[1]
        padded = jnp.concatenate([tail, x.astype(jnp.float32)], axis=1)
        out = _short_conv(padded[:, kept - past :], self.weight[...].astype(jnp.float32)).astype(x.dtype)
        if length is None:
            return out, padded[:, tokens:]
        return out, jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, kept))(padded, length)


def take_back(tail: jax.Array, count: jax.Array) -> jax.Array:
    """Returns a tail `[..., B, W - 1 + R, C]` of a short convolution without its newest `count` `[B]` inputs, 0 to R.

    Zeros come in at the other end: before the next call that keeps a token, they are R inputs back at most.
    """

    def shift(row: jax.Array, count: jax.Array) -> jax.Array:
        padded = jnp.concatenate([jnp.zeros_like(row), row], axis=-2)
        return jax.lax.dynamic_slice_in_dim(padded, row.shape[-2] - count, row.shape[-2], axis=-2)

    return jax.vmap(shift, in_axes=(-3, 0), out_axes=-3)(tail, count)


@jax.custom_vjp
def _short_conv(padded: jax.Array, weight: jax.Array) -> jax.Array:
    """Convolves `padded` `[B, W - 1 + T, C]` with `weight` `[W, C]` and adds the input: `[B, T, C]`.

    Without the barriers, XLA would repeat the operation that produces the input, once for each of the W shifts.
    """
    kernel = weight.shape[0]
    tokens = padded.shape[1] - kernel + 1
    padded = jax.lax.optimization_barrier(padded)
    out = padded[:, kernel - 1 :]
    for k in range(kernel):
        out = out + weight[k] * padded[:, k : k + tokens]
    return out


def _short_conv_fwd(padded, weight):
    return _short_conv(padded, weight), (padded, weight)


def _short_conv_bwd(residuals, grad):
    padded, weight = residuals
    kernel = weight.shape[0]
    total = padded.shape[1]
    tokens = total - kernel + 1
    grad, padded = jax.lax.optimization_barrier((grad, padded))
    dweight = jnp.stack([(grad * padded[:, k : k + tokens]).sum(axis=(0, 1)) for k in range(kernel)])
    late = jax.lax.optimization_barrier(jnp.pad(grad, ((0, 0), (kernel - 1, kernel - 1), (0, 0))))
    dpadded = late[:, :total]
    for k in range(kernel):
        dpadded = dpadded + weight[k] * late[:, kernel - 1 - k : kernel - 1 - k + total]
    return jax.lax.optimization_barrier((dpadded, dweight))


_short_conv.defvjp(_short_conv_fwd, _short_conv_bwd)


# Up to this many rows, reading the weights is what takes time: gate and up are then one pass over the weights.
FEW_ROWS = 64


@jax.custom_vjp
def swiglu(x: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """Returns `(silu(x w1) * x w3) w2`, `[N, D]` (SwiGLU, Shazeer, 2020).

    Args:
      x: `[N, D]`.
      w13: `[D, 2, F]`: w1 (gate) and w3 (up).
      w2: `[F, D]`.
    """
    return _swiglu_fwd(x, w13, w2)[0]


def _swiglu_fwd(x, w13, w2):
    dim, _, width = w13.shape
    if x.shape[0] <= FEW_ROWS:
        both = x @ w13.reshape(dim, 2 * width)
        gate, up = both[:, :width], both[:, width:]
    else:
        gate, up = x @ w13[:, 0], x @ w13[:, 1]
    return (jax.nn.silu(gate) * up) @ w2, (x, gate, up, w13, w2)


def _swiglu_bwd(residuals, grad):
    x, gate, up, w13, w2 = residuals
    dx, dw1, dw3, dw2 = swiglu_grad(x, gate, up, w13[:, 0], w13[:, 1], w2, grad)
    return dx, jnp.stack([dw1, dw3], axis=1), dw2


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def swiglu_grad(
    x: jax.Array, gate: jax.Array, up: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of one SwiGLU with respect to `x`, `w1`, `w3` and `w2`.

    The barriers have the same reason as in `project`.

    Args:
      x: `[N, D]`.
      gate: `x w1`, saved by the forward pass, `[N, F]`; `up` is `x w3` likewise.
      w1, w3: `[D, F]`.
      w2: `[F, D]`.
      grad: the gradient of the output, `[N, D]`.
    """
    grad = jax.lax.optimization_barrier(grad)
    dhidden = _contract(grad, w2, 1, 1)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate, dup, hidden = jax.lax.optimization_barrier(
        (dhidden * up * (sigmoid + silu * (1 - sigmoid)), dhidden * silu, silu * up)
    )
    dx = _contract(dgate, w1, 1, 1) + _contract(dup, w3, 1, 1)
    return dx, _contract(x, dgate, 0, 0), _contract(x, dup, 0, 0), _contract(hidden, grad, 0, 0)


class DenseMLP(nnx.Module):
    """The SwiGLU feed-forward part of the first layers, with a learned global scale."""

    def __init__(self, dim: int, width: int, std: float, prefix: str, placement: Placement = SINGLE_DEVICE):
        self.mesh = placement.mesh
        self.w13 = param(
            (dim, 2, width),
            ("embed", "gate_up", "mlp"),
            normal(std),
            # The released rows alternate: gate, up, gate, up ...
            released=Released(f"{prefix}.w13_dn.weight", (2 * width, dim), (2, 1, 0), (width, 2, dim)),
        )
        self.w2 = param(
            (width, dim), ("mlp", "embed"), normal(std), released=linear(f"{prefix}.w2_md.weight", width, dim)
        )
        self.global_scale = param((1,), ("scalar",), ones, released=Released(f"{prefix}.global_scale", (1,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D]` -> `[B, T, D]`; on a mesh, each device of `tensor` has its share of the width F."""
        dtype = x.dtype
        rows = psum_backward(_flatten_rows(x), self.mesh, TENSOR)
        out = swiglu(rows, self.w13[...].astype(dtype), self.w2[...].astype(dtype))
        return psum_forward(out, self.mesh, TENSOR).reshape(x.shape) * self.global_scale[...].astype(dtype)
