"""The weights of the experts of one device, in floats or in int8."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.spec import Params
from jaxtml.parallel.chips import TPU_LANES


class ExpertWeights(NamedTuple):
    """The experts that a device holds, of one layer, or of a stack of layers of which the one at `at` is meant.

    `w13` `[*stack, E, 2, D, F]` (gate, up) and `w2` `[*stack, E, F, D]`; int8 where `scale13` `[*stack, E, 2, F]` and
    `scale2` `[*stack, E, D]` float32 say what their columns are to be multiplied by.
    """

    w13: jax.Array
    w2: jax.Array
    scale13: jax.Array | None = None
    scale2: jax.Array | None = None
    at: tuple[jax.Array, ...] = ()

    @property
    def count(self) -> int:
        return self.w2.shape[-3]

    @property
    def in_place(self) -> bool:
        """Whether a TPU reads them where they stand: to cut a layer out of the stack is to copy it."""
        return bool(self.at or self.scale13 is not None) and all(size % TPU_LANES == 0 for size in self.w2.shape[-2:])

    @property
    def in_place_on_gpu(self) -> bool:
        """Whether a GPU does. Pallas counts offsets into arrays of up to 4 GiB in 32 bits, but with a sign: too few
        for as many numbers of one byte."""
        bytes_each = (self.w13.size, self.w2.size) if self.scale13 is not None else ()
        return self.in_place and not any(2**31 < size <= 2**32 for size in bytes_each)

    def layer(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """`w13` `[E, 2, D, F]` and `w2` `[E, F, D]` of the layer, as numbers of `dtype`."""
        if self.scale13 is None or self.scale2 is None:
            return self.w13[self.at].astype(dtype), self.w2[self.at].astype(dtype)
        scale13, scale2 = (scale[self.at][..., None, :] for scale in (self.scale13, self.scale2))
        return (self.w13[self.at] * scale13).astype(dtype), (self.w2[self.at] * scale2).astype(dtype)


def quantise_columns(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[..., K, N]` as int8 and a float32 scale per column `[..., N]`: the largest of a column becomes 127."""
    largest = jnp.abs(weights.astype(jnp.float32)).max(axis=-2)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return jnp.round(weights / scale[..., None, :]).astype(jnp.int8), scale


def quantise_experts(params: Params) -> Params:
    """The same tree with every layer's routed experts in int8, and the scales of their columns beside them."""
    if "w13" in params and "router" in params:
        (w13, scale13), (w2, scale2) = quantise_columns(params["w13"]), quantise_columns(params["w2"])
        return {**params, "w13": w13, "w2": w2, "w13_scale": scale13, "w2_scale": scale2}
    return {name: quantise_experts(part) if isinstance(part, dict) else part for name, part in params.items()}
