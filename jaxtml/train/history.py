"""Adds noise and gaps to the model's own speech in training data: in service the model must cope with its own errors.

The model reads its own earlier speech twice: as dMel frames at own-speech positions, and as the frame before in the
flow head. In training this speech comes from a recording, in service from the model itself (exposure bias). With a
perfect history, a model continues the recordings that it has learnt by heart and hardly looks at the text. Called by
`jaxtml.train.loss`.

Axes: B batch, T positions, N own-speech slots, 80 mel channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtml.config import FlowConfig
from jaxtml.model.speech.flow import SCALE
from jaxtml.stream.timebase import LOG_MEL_MAX, LOG_MEL_MIN, N_BINS
from jaxtml.stream.tokens import PositionKind

_LEVEL = (LOG_MEL_MAX - LOG_MEL_MIN) / (N_BINS - 1)  # from one dMel level to the next, in log10


def corrupt_history(bins: jax.Array, kind: jax.Array, config: FlowConfig, row_keys: jax.Array) -> jax.Array:
    """Adds noise and gaps to the own-speech frames of a batch.

    Each row draws one noise level in [0, `history_noise`] bins (as CALM, 2025, does for its latents), and one share of
    missing frames in [0, `history_dropout`] (word dropout, Bowman et al., 2016). With a share of 1 or more, all frames
    of the row are missing. A missing frame is bin 0 in every channel. No sound has this frame: silence is bin 2.

    Args:
      bins: `[B, T, 80]` uint8, dMel frames.
      kind: `[B, T]` uint8, `PositionKind`.
      config: the levels.
      row_keys: `[B]` random keys, one for each row.

    Returns:
      `[B, T, 80]` uint8, changed at OWN positions only.
    """

    def corrupt_row(bins: jax.Array, key: jax.Array) -> jax.Array:
        level_key, noise_key, share_key, gap_key = jax.random.split(key, 4)
        level = config.history_noise * jax.random.uniform(level_key)
        noisy = jnp.clip(jnp.round(bins + level * jax.random.normal(noise_key, bins.shape)), 0, N_BINS - 1)
        missing = jax.random.uniform(gap_key, bins.shape[:1]) < config.history_dropout * jax.random.uniform(share_key)
        return jnp.where(missing[:, None], 0, noisy).astype(bins.dtype)

    return jnp.where((kind == PositionKind.OWN)[..., None], jax.vmap(corrupt_row)(bins, row_keys), bins)


def corrupt_frames(
    frames: jax.Array, config: FlowConfig, row_keys: jax.Array, row: jax.Array, slot: jax.Array
) -> jax.Array:
    """Adds noise and gaps to the frames that the flow head reads; each row has one level of both.

    Args:
      frames: `[N, 400]` float32, normalised log-mels.
      config: the levels.
      row_keys: `[B]` random keys, one for each row.
      row: `[N]` int32, the row of each frame.
      slot: `[N]` int32, the own-speech slot of each frame.

    Returns:
      `[N, 400]`; a missing frame is zero.
    """

    def corrupt(frame: jax.Array, key: jax.Array, slot: jax.Array) -> jax.Array:
        level_key, noise_key, share_key, gap_key = jax.random.split(jax.random.fold_in(key, 2), 4)
        level = config.history_noise * jax.random.uniform(level_key) * _LEVEL / SCALE
        noisy = frame + level * jax.random.normal(jax.random.fold_in(noise_key, slot), frame.shape)
        share = config.history_dropout * jax.random.uniform(share_key)
        missing = jax.random.uniform(jax.random.fold_in(gap_key, slot)) < share
        return jnp.where(missing, 0, noisy)

    return jax.vmap(corrupt)(frames, row_keys[row], slot)
