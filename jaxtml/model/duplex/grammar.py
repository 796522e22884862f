"""The grammar of a micro-turn: which tokens may follow, which token is chosen, and whether the model speaks.

A micro-turn generates, in this order (`jaxtml.stream.layout` has the whole layout):

    [HEARD words]   [SAY text]   LISTEN
    [HEARD words]   [SAY text]   SPEAK   own speech x 4

The gate is the token LISTEN or SPEAK, which ends the text; after SPEAK the gate is open. Where the chosen token is
LISTEN or SPEAK, `decide_gate` takes SPEAK if P(speak) exceeds the config's `gate_threshold`, else LISTEN. P(speak) is
the probability of SPEAK, as if only SPEAK and LISTEN could follow.

`step.py` calls `choose_token` once per generated position. All functions are pure and work on all slots of a batch at
once. The tokens of a session depend on its own logits, seed and history, never on other slots.

Axes: B session slots, V vocabulary.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import DuplexConfig
from jaxtml.model.duplex.state import DuplexState, slot_keys
from jaxtml.stream.tokens import Control


class Phase(IntEnum):
    """Where a slot is within its micro-turn."""

    START = 0  # nothing is generated yet
    HEARD = 1  # after HEARD: the words of the user follow
    TEXT = 2  # after SAY: the text of the assistant follows
    DONE = 3  # after LISTEN or SPEAK, or not active


class Progress(NamedTuple):
    """How far each slot is.

    Attributes:
      phase: `[B]` int32, `Phase`.
      used: `[B]` int32, tokens that the slot has used in this phase.
    """

    phase: jax.Array
    used: jax.Array


def is_writing(progress: Progress) -> jax.Array:
    """Returns which slots have text or the gate still to choose, `[B]` bool."""
    return progress.phase != Phase.DONE


class ControlMasks(NamedTuple):
    """Which slots have chosen which control token, `[B]` bool each."""

    heard: jax.Array
    say: jax.Array
    listen: jax.Array
    speak: jax.Array


def max_generated(config: DuplexConfig) -> int:
    """Returns G, the most tokens that a micro-turn generates: HEARD and its words, SAY and its words, the gate."""
    return (config.max_heard + 1 if config.heard else 0) + config.max_text + 1 + 1


def choose_token(
    config: DuplexConfig, logits: jax.Array, progress: Progress, state: DuplexState, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Chooses the next token of each slot, and decides the gate.

    Args:
      config: limits, temperature and gate threshold.
      logits: `[B, V]` float32.
      progress: how far each slot is.
      state: seeds the sampling.
      index: `[B]` int32, tokens that the slot has generated in this micro-turn.

    Returns:
      `[B]` int32 token ids and `[B]` float32 P(speak).
    """
    masked, p_speak = _mask_logits(config, logits, progress)
    if config.temperature > 0:
        token = sample(masked / config.temperature, config.top_p, state, index)
    else:
        token = jnp.argmax(masked, axis=1)
    return decide_gate(config, token, p_speak), p_speak


def likeliest_token(config: DuplexConfig, logits: jax.Array, progress: Progress) -> jax.Array:
    """Returns `[B]` int32: the likeliest token that the grammar allows, and the gate that the threshold gives."""
    masked, p_speak = _mask_logits(config, logits, progress)
    return decide_gate(config, jnp.argmax(masked, axis=1), p_speak)


def _mask_logits(config: DuplexConfig, logits: jax.Array, progress: Progress) -> tuple[jax.Array, jax.Array]:
    """Returns the logits `[B, V]` with -inf for tokens that the grammar forbids, and P(speak) `[B]`."""
    base = config.control_base
    masked = jnp.where(allowed_tokens(config, progress, logits.shape[1]), logits, -jnp.inf)
    listen, speak = logits[:, base + Control.LISTEN], logits[:, base + Control.SPEAK]
    return masked, jax.nn.sigmoid(speak - listen)


def decide_gate(config: DuplexConfig, token: jax.Array, p_speak: jax.Array) -> jax.Array:
    """Decides whether each slot speaks or listens in this micro-turn.

    The token says when the text is over, namely where it is LISTEN or SPEAK. The probability says which of the two is
    taken: SPEAK where `p_speak` exceeds `gate_threshold`, else LISTEN.

    Args:
      config: has the threshold.
      token: `[B]`, the chosen token ids.
      p_speak: `[B]` float32, P(speak).

    Returns:
      `[B]` int32, `token` with the decided gate in place of LISTEN and SPEAK.
    """
    base = config.control_base
    is_gate = (token == base + Control.LISTEN) | (token == base + Control.SPEAK)
    gate = base + jnp.where(p_speak > config.gate_threshold, Control.SPEAK, Control.LISTEN)
    return jnp.where(is_gate, gate, token).astype(jnp.int32)


def allowed_tokens(config: DuplexConfig, progress: Progress, vocab_size: int) -> jax.Array:
    """Returns `[B, V]` bool: the tokens that the grammar allows next.

    The gate is always allowed. Words are allowed while their part has room. In the text of the assistant, DELEGATE
    and END, which begin and end a request to the background model, are allowed too. HEARD is allowed at the start only,
    SAY until it has come.
    """
    base = config.control_base
    phase, used = progress
    ids = jnp.arange(vocab_size)
    is_text = ids < base
    room_heard = (phase == Phase.HEARD) & (used < config.max_heard)
    room_text = (phase == Phase.TEXT) & (used < config.max_text)
    allowed = is_text & (room_heard | room_text)[:, None]
    delegation = (ids == base + Control.DELEGATE) | (ids == base + Control.END)
    allowed |= delegation & room_text[:, None]
    if config.heard:
        allowed |= (ids == base + Control.HEARD) & (phase == Phase.START)[:, None]
    allowed |= (ids == base + Control.SAY) & (phase != Phase.TEXT)[:, None]
    return allowed | ((ids == base + Control.LISTEN) | (ids == base + Control.SPEAK))


def sample(logits: jax.Array, top_p: float, state: DuplexState, index: jax.Array) -> jax.Array:
    """Samples a token per slot from `logits` `[B, V]`, among the most likely tokens that make up `top_p` together.

    Top-p (nucleus) sampling: Holtzman et al., 2020. Each slot draws with a key of its own (`slot_keys`).
    """
    if top_p < 1.0:
        order = jnp.sort(logits, axis=1, descending=True)
        probability = jax.nn.softmax(order, axis=1)
        kept = jnp.cumsum(probability, axis=1) - probability < top_p
        least = jnp.min(jnp.where(kept, order, jnp.inf), axis=1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(slot_keys(state, index), logits)


def control_masks(config: DuplexConfig, token: jax.Array) -> ControlMasks:
    """Returns which of `token` `[B]` open a part of the micro-turn or are the gate."""
    base = config.control_base
    return ControlMasks(
        heard=token == base + Control.HEARD,
        say=token == base + Control.SAY,
        listen=token == base + Control.LISTEN,
        speak=token == base + Control.SPEAK,
    )


def advance(progress: Progress, chosen: ControlMasks, writing: jax.Array) -> Progress:
    """Returns the progress after the chosen tokens. Slots that are not `writing` `[B]` bool stay where they are."""
    phase, used = progress
    after = jnp.select(list(chosen), [Phase.HEARD, Phase.TEXT, Phase.DONE, Phase.DONE], phase)
    phase = jnp.where(writing, after, phase)
    opened = chosen.heard | chosen.say
    return Progress(phase, jnp.where(writing, jnp.where(opened, 0, used + 1), used))
