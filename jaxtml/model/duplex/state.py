"""What a session remembers between micro-turns, and the inputs and outputs of one micro-turn.

Here are the three tuples of the step (state, inputs, outputs), their first values, and two functions on slots: begin a
session in a slot, and move sessions to other slots. `step.py` computes the next state. `programs.py` compiles all of
it, and says where state and inputs lie on a mesh. The session engine and the tests call these functions through
`programs.Duplex`.

Keep the order of the fields: it is the order of the arguments of every compiled program.

Axes: B session slots, N typed tokens, P patches, G generated tokens of a micro-turn, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.config import DuplexConfig
from jaxtml.model.attention.cache import RetainedTokens
from jaxtml.model.backbone import LayerState
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.speech import vocoder
from jaxtml.stream.dmel import SILENT_BINS, SILENT_MELS
from jaxtml.stream.layout import SPEECH_DIM
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, N_MELS

NARROW_PREFILL = 1 + FRAMES_PER_MICRO_TURN
"""Positions of a prefill without text and pictures: the clock and the user's frames."""


class DuplexState(NamedTuple):
    """Everything that B sessions remember. Each step takes the state as a donated argument and returns the next one.

    Attributes:
      layers: keys, values and convolution tails of the backbone, from `Backbone.init_state`.
      position: `[B]` int32, tokens of the session so far.
      micro_turn: `[B]` int32, micro-turns of the session so far.
      week_ms: `[B]` int32, wall clock: milliseconds since Monday, 00:00 UTC.
      own_frames: `[B, 4, 80]` uint8, the dMel frames of own speech in the last micro-turn.
      own_mels: `[B, 400]` float32, the log-mels of the last 50 ms of own speech.
      spoke: `[B]` bool, whether the last micro-turn spoke.
      vocoder: the vocoder's state, from `vocoder.init_state`.
      key: `[B, 2]` uint32, seeds the sampling of each session.
      retained: which tokens global layers retain beyond their window; None if they retain none.
    """

    layers: list[LayerState] | list[list[LayerState]]
    position: jax.Array
    micro_turn: jax.Array
    week_ms: jax.Array
    own_frames: jax.Array
    own_mels: jax.Array
    spoke: jax.Array
    vocoder: vocoder.VocoderState
    key: jax.Array
    retained: RetainedTokens | None


class MicroTurnInputs(NamedTuple):
    """What one micro-turn takes, for B slots.

    Attributes:
      bins: `[B, 4, 80]` uint8, dMel frames of the user.
      typed: `[B, N]` int32, a TYPED or BACKGROUND token and the text after it.
      typed_length: `[B]` int32, how many tokens of `typed` are real; 0 where there is no text.
      patches: `[B, P, 2, 40, 40, 3]` float32, video of the user.
      patch_count: `[B]` int32, how many of `patches` are real.
      active: `[B]` bool. A slot that is not active keeps its state and gives silence.
    """

    bins: jax.Array
    typed: jax.Array
    typed_length: jax.Array
    patches: jax.Array
    patch_count: jax.Array
    active: jax.Array


class MicroTurnOutputs(NamedTuple):
    """What one micro-turn gives, for B slots.

    Attributes:
      wave: `[B, 3200]` float32, 200 ms of own speech at 16 kHz. The user hears them one micro-turn later.
      tokens: `[B, G]` int32, the generated tokens in order, the gate token last; then 0.
      count: `[B]` int32, how many of `tokens` are real.
      passes: `[B]` int32, forward calls of the backbone that this slot needed. The batch makes as many as the slot that
        needs most.
      speaking: `[B]` bool, whether the gate is open.
      p_speak: `[B]` float32, the probability of SPEAK at the gate, as if only SPEAK and LISTEN could follow.
      frames: `[B, 4, 80]` uint8, the dMel frames of own speech that were fed back; silence where the gate is closed.
      logits: `[B, G, V]` float32, the logits that each generated token was chosen from; None without `trace`.
    """

    wave: jax.Array
    tokens: jax.Array
    count: jax.Array
    passes: jax.Array
    speaking: jax.Array
    p_speak: jax.Array
    frames: jax.Array
    logits: jax.Array | None


def compute_dtype(model: InteractionModel) -> jnp.dtype:
    """Returns the dtype in which a micro-turn computes."""
    return jnp.dtype(model.config.serve.compute_dtype)


def wide_prefill(config: DuplexConfig) -> int:
    """Returns the number of positions of a prefill that has text or patches, or both."""
    return NARROW_PREFILL + config.max_typed + config.max_patches


def init_state(model: InteractionModel, batch: int, seed: int = 0, week_ms: int = 0) -> DuplexState:
    """Returns the state of `batch` sessions that have not begun. Session i samples with the key (seed, i)."""
    zeros = jnp.zeros((batch,), jnp.int32)
    keys = jnp.stack([jnp.full((batch,), seed, jnp.uint32), jnp.arange(batch, dtype=jnp.uint32)], axis=1)
    state = DuplexState(
        layers=model.backbone.init_state(
            batch, wide_prefill(model.config.duplex), compute_dtype(model), model.config.duplex.draft
        ),
        position=zeros,
        micro_turn=zeros,
        week_ms=zeros + week_ms,
        own_frames=jnp.broadcast_to(SILENT_BINS, (batch, FRAMES_PER_MICRO_TURN, N_MELS)),
        own_mels=jnp.broadcast_to(SILENT_MELS, (batch, SPEECH_DIM)),
        spoke=jnp.zeros((batch,), bool),
        vocoder=vocoder.init_state(model.config.vocoder, batch),
        key=keys,
        retained=model.backbone.init_retained(batch),
    )
    return jax.tree.map(jnp.copy, state)  # XLA refuses a donated state in which two arrays share one buffer


def session_bytes(model: InteractionModel) -> int:
    """Returns the bytes of what the model remembers of one session, however long the session lasts."""
    state = jax.eval_shape(lambda: init_state(model, 1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def empty_inputs(config: DuplexConfig, batch: int) -> MicroTurnInputs:
    """Returns the inputs of a micro-turn in which nothing is heard, typed or seen; all slots are active."""
    zeros = jnp.zeros((batch,), jnp.int32)
    return MicroTurnInputs(
        bins=jnp.zeros((batch, FRAMES_PER_MICRO_TURN, N_MELS), jnp.uint8),
        typed=jnp.zeros((batch, config.max_typed), jnp.int32),
        typed_length=zeros,
        patches=jnp.zeros((batch, config.max_patches, 2, 40, 40, 3), jnp.float32),
        patch_count=zeros,
        active=jnp.ones((batch,), bool),
    )


def begin_session(
    model: InteractionModel, state: DuplexState, slot: jax.Array, key: jax.Array, week_ms: jax.Array
) -> DuplexState:
    """Returns `state` with a new session in `slot`; nothing of the slot's former session is left.

    Args:
      model: the model whose state it is.
      state: the sessions of all slots.
      slot: int32 scalar.
      key: `[2]` uint32, seeds the sampling of the new session.
      week_ms: int32 scalar, wall clock at the beginning of the new session.
    """
    fresh = init_state(model, 1)._replace(key=key[None], week_ms=week_ms[None])

    def put(axis: int, array: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, new, slot, axis)

    return jax.tree.map(put, slot_axes(model), state, fresh)


def take_slots(model: InteractionModel, state: DuplexState, slots: jax.Array) -> DuplexState:
    """Returns a state of B' slots: the sessions in `slots` `[B']` int32, in this order."""
    return jax.tree.map(lambda axis, array: jnp.take(array, slots, axis=axis), slot_axes(model), state)


def slot_axes(model: InteractionModel) -> DuplexState:
    """Returns, for each array of a state, the axis that counts slots: the axis whose length differs for 1 and 2."""
    one, two = jax.eval_shape(lambda: (init_state(model, 1), init_state(model, 2)))
    return jax.tree.map(lambda a, b: [x == y for x, y in zip(a.shape, b.shape, strict=True)].index(False), one, two)


def slot_keys(state: DuplexState, index: jax.Array) -> jax.Array:
    """Returns one random key per slot, `[B]`, made of the session's seed, its micro-turn and `index` `[B]`.

    The key depends neither on the slot nor on the size of the batch.
    """
    base = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    fold = jax.vmap(lambda key, turn, i: jax.random.fold_in(jax.random.fold_in(key, turn), i))
    return fold(base, state.micro_turn, index)
