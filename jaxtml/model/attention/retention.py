"""Which tokens global layers retain beyond their window: those of micro-turns that have text.

Most tokens of a session are sound: four frames of the user in every micro-turn, and four of own speech. What the
sound said stands in the text a moment later. So frames leave with the window, and text stays: a request from an hour
ago is still visible, at the cost of a few tokens.

Of each micro-turn with text, these tokens are retained (`jaxtml.stream.layout` has the layout):

- TURN, which carries the clock: a text comes with its time;
- HEARD and the words of the user, SAY and the words of the assistant, TYPED or BACKGROUND and its text;
- patches of pictures that were shown in the same micro-turn.

Frames are never retained. Tokens of a micro-turn are retained from the next micro-turn on. A query sees the last
`AttentionConfig.retained` of the retained tokens. No token is visible twice: a retained token that is still in the
window is seen there, and a pinned token is not retained. Beyond the window, tokens have no relative bias, because
`AttentionConfig.check` keeps the relative extent within the window.

This file finds the tokens in whole sequences. `cache` keeps them in sessions. Called by `backbone`. The prediction
heads (`mtp`), which only training runs, retain nothing.

Axes: B batch, T tokens, F far tokens: those that are pinned or retained.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import AttentionConfig
from jaxtml.stream.tokens import PositionKind


class FarTokens(NamedTuple):
    """The tokens of whole sequences that are visible beyond the window.

    The list of a sequence begins with its pinned tokens; the retained tokens follow, the oldest first. Query i sees
    entry f if its token is beyond the window, and if it is pinned or among the last `retained` entries before `end[i]`.

    Attributes:
      position: `[B, F]` int32, where each token stands in its sequence; T for entries that do not exist.
      end: `[B, T]` int32, for each query the number of entries that are pinned or belong to earlier micro-turns.
    """

    position: jax.Array
    end: jax.Array


def find_far_tokens(config: AttentionConfig, kind: jax.Array) -> FarTokens | None:
    """Finds the far tokens of whole sequences.

    F is the number of tokens outside the window of the last query: no more can be visible beyond a window.

    Args:
      config: window, pinned and retained tokens.
      kind: `[B, T]`, the `PositionKind` of each position.

    Returns:
      The tokens; None if the layers retain none, or if a sequence is not longer than the window.
    """
    tokens = kind.shape[1]
    far = tokens - config.window
    if not config.retained or far <= 0:
        return None
    number = number_micro_turns(kind)
    retained = is_retained(kind, number) & (jnp.arange(tokens) >= config.pinned)
    listed = retained | (jnp.arange(tokens) < config.pinned)
    find = partial(jnp.nonzero, size=far, fill_value=tokens)
    position = jax.vmap(lambda row: find(row)[0])(listed)
    in_micro_turn = _sum_by_micro_turn(retained, number)
    end = jnp.take_along_axis(jnp.cumsum(in_micro_turn, axis=1) - in_micro_turn, number, axis=1)
    return FarTokens(position.astype(jnp.int32), (config.pinned + end).astype(jnp.int32))


def number_micro_turns(kind: jax.Array) -> jax.Array:
    """Returns the number of each token's micro-turn, `[B, T]` int32.

    The first micro-turn is number 1; tokens before it have 0.
    """
    return jnp.cumsum(kind == PositionKind.TURN, axis=1)


def is_retained(kind: jax.Array, number: jax.Array) -> jax.Array:
    """Returns which tokens are retained once their micro-turn is complete, `[B, T]` bool.

    Args:
      kind: `[B, T]`, the `PositionKind` of each position.
      number: from `number_micro_turns`.
    """
    is_text = kind == PositionKind.TEXT
    has_text = jnp.take_along_axis(_sum_by_micro_turn(is_text, number) > 0, number, axis=1)
    return has_text & (is_text | (kind == PositionKind.TURN) | (kind == PositionKind.PATCH))


def _sum_by_micro_turn(mask: jax.Array, number: jax.Array) -> jax.Array:
    """Counts the tokens of `mask` `[B, T]` in each micro-turn: `[B, T + 1]` int32 by the micro-turn's number."""
    count = partial(jax.ops.segment_sum, num_segments=mask.shape[1] + 1, indices_are_sorted=True)
    return jax.vmap(count)(mask.astype(jnp.int32), number)
