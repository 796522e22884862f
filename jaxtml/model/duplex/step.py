"""`micro_turn`: one micro-turn of a batch of sessions, from 200 ms of the user to 200 ms of the assistant.

Read this file from top to bottom. A micro-turn has four stages:

1. `prefill` runs the model over the input: the clock, text, patches, the user's four frames.
2. `write_text` writes text until every slot has chosen its gate (`grammar.py`). A forward call (`verify`) runs the
   token that was chosen last and the tokens that are guessed to follow it. Guesses that the model does not confirm are
   taken back.
3. `speak` draws 200 ms of own speech from the flow head, in slots whose gate is open. The next micro-turn reads the
   dMel frames (quantised log-mels) of this speech.
4. `vocode` turns the log-mels of own speech into a waveform.

If global layers retain tokens, `retain_text` then copies the text of this micro-turn to the second ring of the cache.

All of it is one compiled program with fixed shapes; nothing returns to the host in between. `programs.Duplex` compiles
the program. `converse`, the server, the evaluations and the trainer's samples all call it. The training forward over
the same tokens gives the same logits (`tests/model/duplex/test_step.py`).

The gate has no position (`jaxtml.stream.layout`), so a silent micro-turn costs a single forward call.

Axes: B session slots, T positions of a forward call, N typed tokens, P patches, G generated tokens of a micro-turn, D
model width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.attention.cache import RetainedTokens
from jaxtml.model.backbone import BackboneState
from jaxtml.model.duplex.cpu_batches import run_either, run_in_batches
from jaxtml.model.duplex.grammar import (
    Phase,
    Progress,
    advance,
    choose_token,
    control_masks,
    is_writing,
    likeliest_token,
    max_generated,
)
from jaxtml.model.duplex.state import (
    DuplexState,
    MicroTurnInputs,
    MicroTurnOutputs,
    compute_dtype,
    slot_axes,
    slot_keys,
)
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params
from jaxtml.model.speech import vocoder
from jaxtml.model.speech.flow import normalise
from jaxtml.parallel.collectives import psum
from jaxtml.stream.clock import WEEK_MS, clock_features
from jaxtml.stream.dmel import SILENT_BINS, SILENT_FINE, SILENT_MELS, quantise_jax
from jaxtml.stream.layout import SPEECH_DIM
from jaxtml.stream.timebase import (
    FINE_PER_FRAME,
    FINE_PER_MICRO_TURN,
    FRAMES_PER_MICRO_TURN,
    MICRO_TURN_MS,
    MICRO_TURN_SAMPLES,
    N_MELS,
)
from jaxtml.stream.tokens import Control


class Generated(NamedTuple):
    """What a micro-turn has generated so far.

    Attributes:
      tokens: `[B, G]` int32, 0 after the last token.
      count: `[B]` int32, how many of `tokens` are real.
      passes: `[B]` int32, forward calls of the backbone so far, the prefill included.
      p_speak: `[B]` float32, the probability of SPEAK at the last token, as if only SPEAK and LISTEN could follow.
      logits: `[B, G, V]` float32; `[B, G, 0]` without `trace`.
      fine: `[B, 4, 320]` float32, four fine log-mels per 50 ms of own speech; silence where there is none.
      frames: `[B, 4, 80]` uint8, dMel frames of own speech; silence where there is none.
    """

    tokens: jax.Array
    count: jax.Array
    passes: jax.Array
    p_speak: jax.Array
    logits: jax.Array
    fine: jax.Array
    frames: jax.Array


LoopCarry = tuple[Progress, DuplexState, Generated, jax.Array, jax.Array]
"""What `verify` passes from call to call. The arrays are the token of each slot that was chosen last and not run yet,
`[B]`, and the hidden state that it was chosen from, `[B, D]`."""

SpeechCarry = tuple[DuplexState, Generated, jax.Array]
"""What `speak` passes from batch to batch. The array says which slots speak, `[B]` bool."""

RetentionCarry = tuple[BackboneState, RetainedTokens]
"""What `retain_text` changes: keys and values, and which of them are retained."""

VocoderCarry = tuple[vocoder.VocoderState, jax.Array, jax.Array, jax.Array, jax.Array]
"""What `vocode` passes from batch to batch: vocoder state, waveform, frames, slots to run, slots that speak."""


def micro_turn(
    model: InteractionModel,
    params: Params,
    state: DuplexState,
    inputs: MicroTurnInputs,
    *,
    trace: bool,
    one_cpu: bool,
) -> tuple[DuplexState, MicroTurnOutputs]:
    """Computes one micro-turn of the sessions on one device.

    Args:
      model: the model of the sessions.
      params: from `Duplex.prepare`.
      state: from `init_state` or from the micro-turn before.
      inputs: what the micro-turn is given.
      trace: whether the outputs include the logits.
      one_cpu: whether the program runs on a single CPU device (see `cpu_batches`).

    Returns:
      The next state, and the outputs.
    """
    active = inputs.active
    ringing = state.spoke
    start = state.position
    state, hidden = prefill(model, params, state, inputs, one_cpu)
    state = _forget_old_speech(state, active)
    state, out = write_text(model, params, state, hidden, active, trace, one_cpu)
    speaking = state.spoke & active
    state, out = speak(model, params, state, out, speaking, one_cpu)
    state, wave = vocode(model, params, state, out.fine, speaking, active & (speaking | ringing), one_cpu)
    state = retain_text(model, state, start, inputs, out.count, one_cpu)
    state = state._replace(
        micro_turn=state.micro_turn + active,
        week_ms=(state.week_ms + MICRO_TURN_MS * active) % WEEK_MS,
    )
    logits = out.logits if trace else None
    return state, MicroTurnOutputs(wave, out.tokens, out.count, out.passes, speaking, out.p_speak, out.frames, logits)


def prefill(
    model: InteractionModel, params: Params, state: DuplexState, inputs: MicroTurnInputs, one_cpu: bool
) -> tuple[DuplexState, jax.Array]:
    """Runs the model over what the micro-turn is given; returns the hidden state `[B, D]` of the last position.

    There are two widths: the narrow prefill leaves out the room for text and patches, which most micro-turns do not
    need.
    """
    trunk = model.bind(params)
    config, dtype = model.config.duplex, compute_dtype(model)
    batch = inputs.bins.shape[0]
    clock = trunk.clock(clock_features(state.micro_turn, state.week_ms, jnp), dtype)
    turn = trunk.embed(jnp.full((batch,), config.control_base + Control.TURN), dtype) + clock
    user = trunk.audio(inputs.bins, dtype)
    always = jnp.ones((batch, 1), bool)

    def narrow(carry: tuple[DuplexState, jax.Array]) -> tuple[DuplexState, jax.Array]:
        x = jnp.concatenate([turn[:, None], user], axis=1)
        state, hidden = forward(model, params, carry[0], x, inputs.active * x.shape[1])
        return state, hidden[:, -1]

    def wide(carry: tuple[DuplexState, jax.Array]) -> tuple[DuplexState, jax.Array]:
        typed = trunk.embed(inputs.typed, dtype)
        parts = [
            (turn[:, None], always),
            (typed, jnp.arange(typed.shape[1]) < inputs.typed_length[:, None]),
        ]
        if config.max_patches:
            flat = inputs.patches.reshape(-1, *inputs.patches.shape[2:])
            seen = trunk.visual(flat, dtype).reshape(batch, config.max_patches, -1)
            parts.append((seen, jnp.arange(seen.shape[1]) < inputs.patch_count[:, None]))
        parts.append((user, always))
        return forward_parts(model, params, carry[0], parts, inputs.active)

    needs_wide = any_session(model, inputs.active & ((inputs.typed_length > 0) | (inputs.patch_count > 0)))
    carry = (state, jnp.zeros((batch, model.config.backbone.d_model), dtype))
    return run_either(one_cpu, needs_wide, wide, narrow, carry)


def write_text(
    model: InteractionModel,
    params: Params,
    state: DuplexState,
    hidden: jax.Array,
    active: jax.Array,
    trace: bool,
    one_cpu: bool,
) -> tuple[DuplexState, Generated]:
    """Generates text until every slot has chosen its gate. Slots that have chosen it wait for the others.

    Args:
      model: the model of the sessions.
      params: from `Duplex.prepare`.
      state: after `prefill`.
      hidden: `[B, D]`, the hidden state of the last position of the prefill.
      active: `[B]` bool.
      trace: whether to keep the logits.
      one_cpu: whether the program runs on a single CPU device.
    """
    out = nothing_generated(model, active, trace)
    progress = Progress(jnp.where(active, Phase.START, Phase.DONE), jnp.zeros((len(hidden),), jnp.int32))
    progress, state, out, token = choose(model, progress, state, out, model.logits(params, hidden), active, trace)

    def unfinished(carry: LoopCarry) -> jax.Array:
        return any_session(model, is_writing(carry[0]))

    def finish(carry: LoopCarry) -> LoopCarry:
        return jax.lax.while_loop(unfinished, partial(verify, model, params, trace=trace), carry)

    carry = (progress, state, out, token, hidden)
    axes: Any = jax.tree.map(lambda _: 0, carry)
    axes = (axes[0], slot_axes(model), *axes[2:])
    _, state, out, _, _ = run_in_batches(one_cpu, finish, carry, axes, 2 * ~is_writing(progress))
    return state, out


def verify(model: InteractionModel, params: Params, carry: LoopCarry, *, trace: bool) -> LoopCarry:
    """Runs the chosen token of each slot and the tokens that are guessed to follow; keeps what the model confirms.

    The model chooses a token after each position. As long as it chooses the guessed one, the next position is valid
    too. The tokens are those of one position per call, because each is chosen from the same logits with the same key.
    """
    trunk, dtype = model.bind(params), compute_dtype(model)
    progress, state, out, token, hidden = carry
    writing = is_writing(progress)
    guesses = guess(model, params, progress, token, hidden)
    tokens = jnp.concatenate([token[:, None], guesses], axis=1)
    width = tokens.shape[1]
    state, hidden_states = forward(model, params, state, trunk.embed(tokens, dtype), writing * width)
    logits = model.logits(params, hidden_states)
    out = out._replace(passes=out.passes + writing)
    kept = jnp.zeros_like(token)
    valid = writing
    for i in range(width):
        hidden = jnp.where(valid[:, None], hidden_states[:, i], hidden)
        progress, state, out, chosen = choose(model, progress, state, out, logits[:, i], valid, trace)
        token, kept = jnp.where(valid, chosen, token), kept + valid
        if i < width - 1:
            valid &= is_writing(progress) & (chosen == guesses[:, i])
    return progress, take_back(model, state, writing * width - kept), out, token, hidden


def guess(
    model: InteractionModel, params: Params, progress: Progress, token: jax.Array, hidden: jax.Array
) -> jax.Array:
    """Guesses the tokens after `token` `[B]`, which was chosen from `hidden` `[B, D]`; returns `[B, K]` int32."""
    config, trunk, dtype = model.config.duplex, model.bind(params), compute_dtype(model)
    guesses = []
    for _ in range(config.draft):
        hidden = trunk.draft(hidden, trunk.embed(token, dtype))
        logits = model.logits(params, hidden)
        token = likeliest_token(config, logits, progress)
        progress = advance(progress, control_masks(config, token), is_writing(progress))
        guesses.append(token)
    return jnp.stack(guesses, axis=1) if guesses else jnp.zeros((len(token), 0), jnp.int32)


def choose(
    model: InteractionModel,
    progress: Progress,
    state: DuplexState,
    out: Generated,
    logits: jax.Array,
    writing: jax.Array,
    trace: bool,
) -> tuple[Progress, DuplexState, Generated, jax.Array]:
    """Chooses the next token `[B]` of the slots in `writing` `[B]` bool. The gate, SPEAK or LISTEN, ends the text.

    `logits` `[B, V]` are those of the last position.
    """
    config = model.config.duplex
    token, p_speak = choose_token(config, logits, progress, state, out.count)
    # Slots that do not write get column G. It is beyond the end of the array, so XLA drops their values.
    slots, column = jnp.arange(logits.shape[0]), jnp.where(writing, out.count, max_generated(config))
    out = out._replace(
        tokens=out.tokens.at[slots, column].set(token, mode="drop"),
        count=out.count + writing,
        p_speak=jnp.where(writing, p_speak, out.p_speak),
        logits=out.logits.at[slots, column].set(logits, mode="drop") if trace else out.logits,
    )
    chosen = control_masks(config, token)
    progress = advance(progress, chosen, writing)
    state = state._replace(spoke=jnp.where(writing, chosen.speak, state.spoke))
    return progress, state, out, token


def speak(
    model: InteractionModel, params: Params, state: DuplexState, out: Generated, speaking: jax.Array, one_cpu: bool
) -> tuple[DuplexState, Generated]:
    """Generates 200 ms of own speech in slots whose gate is open, with one forward call and one of the flow head.

    The forward call runs the four own-speech positions. They read the frames of the micro-turn before, so all are known
    when the gate is decided. The flow head draws the frames of all four positions together: one coarse and four fine
    log-mels each. Each frame is drawn with the frame before as a condition.

    Args:
      model: the model of the sessions.
      params: from `Duplex.prepare`.
      state: after `write_text`.
      out: from `write_text`.
      speaking: `[B]` bool, slots whose gate is open.
      one_cpu: whether the program runs on a single CPU device.
    """
    trunk, flow = model.bind(params), model.config.flow
    dtype = compute_dtype(model)

    def run(carry: SpeechCarry) -> SpeechCarry:
        state, out, speaking = carry
        batch = len(speaking)
        x = trunk.audio(state.own_frames, dtype) + trunk.own[...].astype(dtype)
        state, hidden = forward(model, params, state, x, speaking * x.shape[1])
        # Sampling tokens uses key indices below G. The noise uses index G, so no key is used twice.
        keys = slot_keys(state, jnp.full((batch,), max_generated(model.config.duplex)))
        noise = jax.vmap(lambda key: jax.random.normal(key, (FRAMES_PER_MICRO_TURN, SPEECH_DIM), dtype))(keys)
        before = normalise(state.own_mels)
        mels = trunk.flow.sample(hidden, before, flow.temperature * noise, flow.steps).astype(jnp.float32)
        frames = quantise_jax(mels[..., :N_MELS]).astype(jnp.uint8)
        mask = speaking[:, None, None]
        out = out._replace(
            passes=out.passes + speaking,
            fine=jnp.where(mask, mels[..., N_MELS:], out.fine),
            frames=jnp.where(mask, frames, out.frames),
        )
        state = state._replace(
            own_frames=jnp.where(mask, frames, state.own_frames),
            own_mels=jnp.where(speaking[:, None], mels[:, -1], state.own_mels),
        )
        return state, out, jnp.zeros_like(speaking)

    carry = (state, out, speaking)
    axes: Any = (slot_axes(model), jax.tree.map(lambda _: 0, out), 0)
    state, out, _ = run_either(
        one_cpu,
        any_session(model, speaking),
        lambda carry: run_in_batches(one_cpu, run, carry, axes, 2 * ~speaking),
        lambda carry: carry,
        carry,
    )
    return state, out


def vocode(
    model: InteractionModel,
    params: Params,
    state: DuplexState,
    fine: jax.Array,
    speaking: jax.Array,
    running: jax.Array,
    one_cpu: bool,
) -> tuple[DuplexState, jax.Array]:
    """Turns fine log-mels into the waveform `[B, 3200]` of `running` slots; other slots are silent.

    A slot runs the vocoder in each micro-turn in which it speaks, and in the next micro-turn, so that a voice that was
    cut off rings out. Unless the slot speaks again, its vocoder state is reset at the end of that next micro-turn. The
    time of the reset must not depend on whether another slot runs the vocoder.

    Args:
      model: the model of the sessions.
      params: from `Duplex.prepare`.
      state: after `speak`.
      fine: `[B, 4, 320]` float32.
      speaking: `[B]` bool, slots whose gate is open.
      running: `[B]` bool, slots that speak or have spoken in the micro-turn before.
      one_cpu: whether the program runs on a single CPU device.
    """
    config = model.config.vocoder
    batch = running.shape[0]
    frames = fine.reshape(batch, FINE_PER_MICRO_TURN, N_MELS)

    def run(carry: VocoderCarry) -> VocoderCarry:
        voice, wave, frames, running, speaking = carry
        fresh = vocoder.init_state(config, len(running))
        new, sound = vocoder.vocode(config, params["vocoder"], voice, frames)
        voice = _where(running, _where(speaking, new, fresh), voice)
        return voice, jnp.where(running[:, None], sound, wave), frames, jnp.zeros_like(running), speaking

    silence = jnp.zeros((batch, MICRO_TURN_SAMPLES), jnp.float32)
    carry = (state.vocoder, silence, frames, running, speaking)
    axes: Any = jax.tree.map(lambda _: 0, carry)
    carry = run_either(
        one_cpu,
        jnp.any(running),
        lambda carry: run_in_batches(one_cpu, run, carry, axes, 2 * ~running),
        lambda carry: carry,
        carry,
    )
    return state._replace(vocoder=carry[0]), carry[1]


def retain_text(
    model: InteractionModel,
    state: DuplexState,
    start: jax.Array,
    inputs: MicroTurnInputs,
    generated: jax.Array,
    one_cpu: bool,
) -> DuplexState:
    """Retains the text of this micro-turn beyond the window of global layers; see `attention.retention`.

    Two stretches of positions are retained: from TURN to the last patch, and the generated tokens before the gate. The
    user's frames stand between them.

    Args:
      model: the model of the sessions.
      state: after all positions of the micro-turn have been run.
      start: `[B]` int32, the position of the TURN token.
      inputs: what the micro-turn was given.
      generated: `[B]` int32, tokens that the micro-turn has generated, the gate included.
      one_cpu: whether the program runs on a single CPU device.
    """
    if state.retained is None:
        return state
    config = model.config.duplex
    given = 1 + inputs.typed_length + inputs.patch_count
    has_text = inputs.active & ((inputs.typed_length > 0) | (generated > 1))
    count = jnp.where(has_text, given + generated - 1, 0)
    index = jnp.arange(1 + config.max_typed + config.max_patches + max_generated(config) - 1)
    position = start[:, None] + index + jnp.where(index < given[:, None], 0, FRAMES_PER_MICRO_TURN)

    def retain(carry: RetentionCarry) -> RetentionCarry:
        return model.backbone.retain(*carry, position, count)

    carry = (state.layers, state.retained)
    layers, retained = run_either(one_cpu, jnp.any(has_text), retain, lambda carry: carry, carry)
    return state._replace(layers=layers, retained=retained)


def forward(
    model: InteractionModel, params: Params, state: DuplexState, x: jax.Array, length: jax.Array
) -> tuple[DuplexState, jax.Array]:
    """Runs the backbone over `x` `[B, T, D]`, of which `length` `[B]` positions are real.

    Returns:
      The state after these positions, and the normed hidden states `[B, T, D]`.
    """
    y, layers = model.backbone.forward_cached(params["layers"], x, state.layers, state.position, length, state.retained)
    return state._replace(layers=layers, position=state.position + length), model.bind(params).norm(y)


def take_back(model: InteractionModel, state: DuplexState, count: jax.Array) -> DuplexState:
    """Returns the state without the newest `count` `[B]` positions of each session."""
    return state._replace(layers=model.backbone.take_back(state.layers, count), position=state.position - count)


def forward_parts(
    model: InteractionModel,
    params: Params,
    state: DuplexState,
    parts: list[tuple[jax.Array, jax.Array]],
    active: jax.Array,
) -> tuple[DuplexState, jax.Array]:
    """Joins embedded parts `[B, n, D]`, moves the positions that are present to the left, and runs `forward`.

    Each part comes with a bool mask `[B, n]` or `[B, 1]` of the positions that are present.

    Returns:
      The state after these positions, and the normed hidden state `[B, D]` of the last one.
    """
    x = jnp.concatenate([part for part, _ in parts], axis=1)
    present = jnp.concatenate([jnp.broadcast_to(mask, part.shape[:2]) for part, mask in parts], axis=1)
    order = jnp.argsort(~present, axis=1, stable=True)
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    count = present.sum(axis=1, dtype=jnp.int32)
    state, hidden = forward(model, params, state, x, active * count)
    return state, jnp.take_along_axis(hidden, count[:, None, None] - 1, axis=1)[:, 0]


def any_session(model: InteractionModel, mask: jax.Array) -> jax.Array:
    """Returns whether `mask` `[B]` holds for any session of one replica of the mesh.

    All devices of the replica get the same answer, because they have to run the collectives of a branch together. That
    includes the devices along `tensor`: they have the same sessions, but rounding may differ between them.
    """
    return psum(jnp.any(mask).astype(jnp.int32), model.placement.mesh, ("data", "expert", "tensor")) > 0


def _forget_old_speech(state: DuplexState, active: jax.Array) -> DuplexState:
    """Puts silence where the own speech of the micro-turn before was, in active slots that did not speak then."""
    kept = state.spoke | ~active
    return state._replace(
        own_frames=jnp.where(kept[:, None, None], state.own_frames, SILENT_BINS),
        own_mels=jnp.where(kept[:, None], state.own_mels, SILENT_MELS),
    )


def nothing_generated(model: InteractionModel, active: jax.Array, trace: bool) -> Generated:
    """Returns the `Generated` of a micro-turn after its prefill: no tokens, silence. `active` is `[B]` bool."""
    batch = len(active)
    generated = max_generated(model.config.duplex)
    vocab = model.config.backbone.vocab_size
    return Generated(
        tokens=jnp.zeros((batch, generated), jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
        passes=active.astype(jnp.int32),
        p_speak=jnp.zeros((batch,), jnp.float32),
        logits=jnp.zeros((batch, generated, vocab if trace else 0), jnp.float32),
        fine=jnp.broadcast_to(SILENT_FINE, (batch, FRAMES_PER_MICRO_TURN, FINE_PER_FRAME, N_MELS)).reshape(
            batch, FRAMES_PER_MICRO_TURN, -1
        ),
        frames=jnp.broadcast_to(SILENT_BINS, (batch, FRAMES_PER_MICRO_TURN, N_MELS)),
    )


@partial(jax.jit, inline=True)
def _where(mask: jax.Array, a: vocoder.VocoderState, b: vocoder.VocoderState) -> vocoder.VocoderState:
    """Returns, per slot, `a` where `mask` `[B]`, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)
