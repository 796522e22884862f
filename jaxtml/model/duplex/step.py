"""`micro_turn`: one micro-turn of a batch of sessions, from 200 ms of the user to 200 ms of the assistant.

Read this file from top to bottom. A micro-turn has four stages:

1. `prefill` runs the model over the input: the pending LISTEN token, the clock, text, patches, the user's four frames.
2. `generate` loops over positions until every slot is done. A slot writes text (`write`) and chooses its gate there
   (`grammar.py`).
3. `speak`, inside this loop, draws 50 ms of own speech from the flow head. The dMel frame (quantised log-mels)
   of this speech is fed back.
4. `vocode` turns the log-mels of own speech into a waveform.

If global layers retain tokens, `retain_text` then copies the text of this micro-turn to the second ring of the cache.

All of it is one compiled program with fixed shapes; nothing returns to the host in between. `programs.Duplex` compiles
the program. `converse`, the server, the evaluations and the trainer's samples all call it. The training forward over
the same tokens gives the same logits (`tests/model/duplex/test_step.py`).

A LISTEN token is not run when it is chosen. It is the first position of the next micro-turn, so that a silent
micro-turn costs a single forward call.

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
from jaxtml.model.duplex.grammar import Phase, Progress, advance, choose_token, control_masks, max_generated
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
from jaxtml.parallel.collectives import psum
from jaxtml.stream.clock import WEEK_MS, clock_features
from jaxtml.stream.dmel import SILENT_BINS, SILENT_FINE, quantise_jax
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
      p_speak: `[B]` float32, the probability of SPEAK at the last token, as if only SPEAK and LISTEN could follow.
      logits: `[B, G, V]` float32; `[B, G, 0]` without `trace`.
      fine: `[B, 4, 320]` float32, four fine log-mels per 50 ms of own speech; silence where there is none.
      frames: `[B, 4, 80]` uint8, dMel frames of own speech; silence where there is none.
    """

    tokens: jax.Array
    count: jax.Array
    p_speak: jax.Array
    logits: jax.Array
    fine: jax.Array
    frames: jax.Array


LoopCarry = tuple[Progress, DuplexState, Generated, jax.Array]
"""What `generate` passes from position to position. The array is the next token of each slot; -1: own speech."""

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
    start = state.position + (state.pending_listen >= 0)  # where TURN stands
    state, hidden = prefill(model, params, state, inputs, one_cpu)
    state, out = generate(model, params, state, hidden, active, trace, one_cpu)
    speaking = state.spoke & active
    state, wave = vocode(model, params, state, out.fine, speaking, active & (speaking | ringing), one_cpu)
    state = retain_text(model, state, start, inputs, out.count, one_cpu)
    state = state._replace(
        micro_turn=state.micro_turn + active,
        week_ms=(state.week_ms + MICRO_TURN_MS * active) % WEEK_MS,
    )
    logits = out.logits if trace else None
    return state, MicroTurnOutputs(wave, out.tokens, out.count, speaking, out.p_speak, out.frames, logits)


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
    listen = trunk.embed(jnp.maximum(state.pending_listen, 0), dtype)
    user = trunk.audio(inputs.bins, dtype)
    has_listen = state.pending_listen >= 0
    always = jnp.ones((batch, 1), bool)

    def narrow(carry: tuple[DuplexState, jax.Array]) -> tuple[DuplexState, jax.Array]:
        parts = [(listen[:, None], has_listen[:, None]), (turn[:, None], always), (user, always)]
        return forward_parts(model, params, carry[0], parts, inputs.active)

    def wide(carry: tuple[DuplexState, jax.Array]) -> tuple[DuplexState, jax.Array]:
        typed = trunk.embed(inputs.typed, dtype)
        parts = [
            (listen[:, None], has_listen[:, None]),
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
    state, hidden = run_either(one_cpu, needs_wide, wide, narrow, carry)
    return state._replace(pending_listen=jnp.where(inputs.active, -1, state.pending_listen)), hidden


def generate(
    model: InteractionModel,
    params: Params,
    state: DuplexState,
    hidden: jax.Array,
    active: jax.Array,
    trace: bool,
    one_cpu: bool,
) -> tuple[DuplexState, Generated]:
    """Generates text, gate and own speech, one position per slot and round, until every slot is done.

    Slots advance independently: one may speak its second frame while another still writes what it heard.

    Args:
      model: the model of the sessions.
      params: from `Duplex.prepare`.
      state: after `prefill`.
      hidden: `[B, D]`, the hidden state of the last position of the prefill.
      active: `[B]` bool.
      trace: whether to keep the logits.
      one_cpu: whether the program runs on a single CPU device.
    """
    trunk = model.bind(params)
    dtype = compute_dtype(model)
    out = _nothing_generated(model, len(hidden), trace)
    own_frame = jnp.where((state.spoke | ~active)[:, None], state.own_frame, SILENT_BINS)
    state = state._replace(own_frame=own_frame)
    progress = Progress(jnp.where(active, Phase.START, Phase.DONE), jnp.zeros((len(hidden),), jnp.int32))
    progress, state, out, token = write(model, params, progress, state, out, hidden, trace)

    def unfinished(carry: LoopCarry) -> jax.Array:
        return any_session(model, carry[0].phase != Phase.DONE)

    def next_position(carry: LoopCarry) -> LoopCarry:
        progress, state, out, token = carry
        # Token -1 stands for an own-speech position.
        own = trunk.audio(state.own_frame, dtype) + trunk.own[...].astype(dtype)
        x = jnp.where((token < 0)[:, None], own, trunk.embed(jnp.maximum(token, 0), dtype))
        running = progress.phase != Phase.DONE
        state, hidden = forward(model, params, state, x[:, None], running.astype(jnp.int32))
        speaking = progress.phase == Phase.SPEECH
        progress, state, out = speak(model, params, progress, state, out, hidden)
        progress, state, out, token = write(model, params, progress, state, out, hidden, trace)
        return progress, state, out, jnp.where(speaking, -1, token)

    def finish(carry: LoopCarry) -> LoopCarry:
        return jax.lax.while_loop(unfinished, next_position, carry)

    carry = (progress, state, out, token)
    axes: Any = jax.tree.map(lambda _: 0, carry)
    axes = (axes[0], slot_axes(model), *axes[2:])
    running = progress.phase != Phase.DONE
    # A batch takes as many rounds as its slowest slot, and a slot that speaks takes many. So slots that will probably
    # speak (they spoke before, or write already) are computed together, in the same batches.
    order = jnp.where(running, ~(state.spoke | (progress.phase > Phase.HEARD)), 2)
    _, state, out, _ = run_in_batches(one_cpu, finish, carry, axes, order)
    return state, out


def write(
    model: InteractionModel,
    params: Params,
    progress: Progress,
    state: DuplexState,
    out: Generated,
    hidden: jax.Array,
    trace: bool,
) -> tuple[Progress, DuplexState, Generated, jax.Array]:
    """Chooses the next token `[B]` of slots that write text. SPEAK leads to own speech, LISTEN ends the micro-turn.

    `hidden` `[B, D]` is the hidden state of the last position.
    """
    config = model.config.duplex
    writing = (progress.phase != Phase.SPEECH) & (progress.phase != Phase.DONE)
    logits = model.logits(params, hidden)
    token, p_speak = choose_token(config, logits, progress, state, out.count)
    # Slots that do not write get column G. It is beyond the end of the array, so XLA drops their values.
    slots, column = jnp.arange(hidden.shape[0]), jnp.where(writing, out.count, max_generated(config))
    out = out._replace(
        tokens=out.tokens.at[slots, column].set(token, mode="drop"),
        count=out.count + writing,
        p_speak=jnp.where(writing, p_speak, out.p_speak),
        logits=out.logits.at[slots, column].set(logits, mode="drop") if trace else out.logits,
    )
    chosen = control_masks(config, token)
    progress = advance(progress, chosen, writing)
    state = state._replace(
        pending_listen=jnp.where(writing & chosen.listen, token, state.pending_listen),
        spoke=jnp.where(writing, chosen.speak, state.spoke),
    )
    return progress, state, out, token


def speak(
    model: InteractionModel, params: Params, progress: Progress, state: DuplexState, out: Generated, hidden: jax.Array
) -> tuple[Progress, DuplexState, Generated]:
    """Generates 50 ms of own speech in slots whose last position held own speech.

    The flow head draws one coarse and four fine log-mels from `hidden` `[B, D]`. In the phase SPEECH, `used` counts own
    positions that have been run. At 0 only the SPEAK token has been run, and no sound is due yet.
    """
    flow = model.config.flow
    phase, used = progress
    speaking = phase == Phase.SPEECH
    ready = speaking & (used > 0)

    def draw(own_frame: jax.Array, fine: jax.Array, frames: jax.Array) -> tuple[jax.Array, ...]:
        # Sampling tokens uses key indices below G. The noise uses indices from G on, so no key is used twice.
        keys = slot_keys(state, max_generated(model.config.duplex) + used)
        noise = jax.vmap(lambda key: jax.random.normal(key, (SPEECH_DIM,), compute_dtype(model)))(keys)
        mels = model.bind(params).flow.sample(hidden, flow.temperature * noise, flow.steps)
        mels = mels.astype(jnp.float32)
        bins = quantise_jax(mels[:, :N_MELS]).astype(jnp.uint8)
        slots, column = jnp.arange(hidden.shape[0]), jnp.where(ready, used - 1, FRAMES_PER_MICRO_TURN)
        fine = fine.at[slots, column].set(mels[:, N_MELS:], mode="drop")
        frames = frames.at[slots, column].set(bins, mode="drop")
        return jnp.where(ready[:, None], bins, own_frame), fine, frames

    arrays = (state.own_frame, out.fine, out.frames)
    own_frame, fine, frames = jax.lax.cond(jnp.any(ready), draw, lambda *same: same, *arrays)
    state, out = state._replace(own_frame=own_frame), out._replace(fine=fine, frames=frames)
    ended = speaking & (used == FRAMES_PER_MICRO_TURN)
    return Progress(jnp.where(ended, Phase.DONE, phase), used + speaking), state, out


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
      state: after `generate`.
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
      state: after all positions of the micro-turn, except a LISTEN token, have been run.
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
      The state after these positions, and the normed hidden state `[B, D]` of the last real position.
    """
    y, layers = model.backbone.forward_cached(params["layers"], x, state.layers, state.position, length, state.retained)
    last = jnp.take_along_axis(y, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = model.bind(params).norm(last)
    return state._replace(layers=layers, position=state.position + length), hidden


def forward_parts(
    model: InteractionModel,
    params: Params,
    state: DuplexState,
    parts: list[tuple[jax.Array, jax.Array]],
    active: jax.Array,
) -> tuple[DuplexState, jax.Array]:
    """Joins embedded parts `[B, n, D]`, moves the positions that are present to the left, and runs `forward`.

    Each part comes with a bool mask `[B, n]` or `[B, 1]` of the positions that are present.
    """
    x = jnp.concatenate([part for part, _ in parts], axis=1)
    present = jnp.concatenate([jnp.broadcast_to(mask, part.shape[:2]) for part, mask in parts], axis=1)
    order = jnp.argsort(~present, axis=1, stable=True)
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    return forward(model, params, state, x, jnp.where(active, present.sum(axis=1), 0).astype(jnp.int32))


def any_session(model: InteractionModel, mask: jax.Array) -> jax.Array:
    """Returns whether `mask` `[B]` holds for any session of one replica of the mesh.

    All devices of the replica get the same answer, because they have to run the collectives of a branch together. That
    includes the devices along `tensor`: they have the same sessions, but rounding may differ between them.
    """
    return psum(jnp.any(mask).astype(jnp.int32), model.placement.mesh, ("data", "expert", "tensor")) > 0


def _nothing_generated(model: InteractionModel, batch: int, trace: bool) -> Generated:
    """Returns the `Generated` of a micro-turn that begins: no tokens, silence."""
    generated = max_generated(model.config.duplex)
    vocab = model.config.backbone.vocab_size
    return Generated(
        tokens=jnp.zeros((batch, generated), jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
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
