"""The weights of the routed experts of one device, in floats or in int8.

Axes: E experts of this device, D model width, F expert width, K rows and N columns of any matrix. Called by `moe`,
which makes an `ExpertWeights`, by all files that compute with one, and by `duplex.programs`, which quantises.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.spec import Params
from jaxtml.parallel.chips import TPU_LANES


class ExpertWeights(NamedTuple):
    """The routed experts of one layer, or of a stack of layers and the index of one layer in it.

    Attributes:
      w13: `[*stack, E, 2, D, F]`, gate and up; int8 if there are scales.
      w2: `[*stack, E, F, D]`; int8 if there are scales.
      scale13: `[*stack, E, 2, F]` float32, the factors of the columns of `w13`.
      scale2: `[*stack, E, D]` float32, the factors of the columns of `w2`.
      layer_index: the index of the layer, one int32 per stacked dimension.
    """

    w13: jax.Array
    w2: jax.Array
    scale13: jax.Array | None = None
    scale2: jax.Array | None = None
    layer_index: tuple[jax.Array, ...] = ()

    @property
    def count(self) -> int:
        """E, the experts of this device."""
        return self.w2.shape[-3]

    @property
    def in_place(self) -> bool:
        """Whether a TPU reads the experts where they are: cutting a layer out of the stack would copy it."""
        fits_kernel = all(size % TPU_LANES == 0 for size in self.w2.shape[-2:])
        return bool(self.layer_index or self.scale13 is not None) and fits_kernel

    @property
    def in_place_on_gpu(self) -> bool:
        """Whether a GPU reads the experts where they are.

        For arrays of up to 4 GiB, Pallas counts offsets in 32 bits with a sign. That is too few for an int8 array of
        more than 2 GiB, which has as many elements as bytes. For arrays of more than 4 GiB, offsets have 64 bits.
        """
        int8_sizes = (self.w13.size, self.w2.size) if self.scale13 is not None else ()
        return self.in_place and not any(2**31 < size <= 2**32 for size in int8_sizes)

    def layer(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Returns `w13` `[E, 2, D, F]` and `w2` `[E, F, D]` of the one layer, in floats of `dtype`."""
        if self.scale13 is None or self.scale2 is None:
            return self.w13[self.layer_index].astype(dtype), self.w2[self.layer_index].astype(dtype)
        scale13, scale2 = (scale[self.layer_index][..., None, :] for scale in (self.scale13, self.scale2))
        return (
            (self.w13[self.layer_index] * scale13).astype(dtype),
            (self.w2[self.layer_index] * scale2).astype(dtype),
        )


def quantise_columns(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises matrices `[..., K, N]` to int8; the largest magnitude of a column becomes 127.

    Returns:
      int8 `[..., K, N]`, and the scale of each column, float32 `[..., N]`.
    """
    largest = jnp.abs(weights.astype(jnp.float32)).max(axis=-2)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return jnp.round(weights / scale[..., None, :]).astype(jnp.int8), scale


def quantise_experts(params: Params) -> Params:
    """Returns the tree with the routed experts of every layer in int8, and the scales of their columns beside them."""
    if "w13" in params and "router" in params:
        (w13, scale13), (w2, scale2) = quantise_columns(params["w13"]), quantise_columns(params["w2"])
        return {**params, "w13": w13, "w2": w2, "w13_scale": scale13, "w2_scale": scale2}
    return {name: quantise_experts(part) if isinstance(part, dict) else part for name, part in params.items()}
