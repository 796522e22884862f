"""Numerical conventions that several parts of the model share: the masked logit, and products summed in float32.

Called by attention and by the vocabulary's cross-entropy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED_LOGIT = -1e30  # replaces the logits that a softmax must ignore; finite, so that the difference of two is not NaN


def einsum_float32(equation: str, *operands: jax.Array) -> jax.Array:
    """Computes an einsum and sums its products in float32, whatever the dtype of the operands."""
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
