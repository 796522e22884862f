"""Numerical conventions that several parts of the model share: the masked logit, products summed in float32.

Called by attention and by the vocabulary's cross-entropy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED_LOGIT = -1e30  # logit of a key that must not be seen


def einsum_float32(equation: str, *operands: jax.Array) -> jax.Array:
    """Products summed in float32."""
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
