"""`duplex_step`: one micro-turn of a batch of sessions, as one compiled program with fixed shapes.

Axes: B session slots, T positions of a forward call, N typed tokens, P patches, G generated tokens of a micro-turn, D
model width, V vocabulary.

Order inside: prefill (the LISTEN token left over, clock, text, patches, four user frames); one loop with early exit in
which each slot writes its text, chooses its gate and, where that opens, speaks (flow head, feedback of the quantised
frame); the vocoder. Nothing returns to the host in between. A LISTEN token is not run by itself: it is the first
position of the next micro-turn, so that a silent one costs a single forward call. `converse`, the server, the
evaluations and on-policy sampling all call this one function; the training forward over the same tokens gives the same
logits (tests/model/test_duplex.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtml.errors import InputError
from jaxtml.model.experts.weights import quantise_experts
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import partition_specs
from jaxtml.model.spec import Params, ParamSpec
from jaxtml.model.speech import vocoder
from jaxtml.parallel.collectives import psum
from jaxtml.parallel.mesh import SERVE
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


class DuplexState(NamedTuple):
    """Everything a session remembers, for B slots. Donated from step to step.

    `position` `[B]` int32 counts tokens, `turn` `[B]` int32 micro-turns since the session began, `week_ms` `[B]` int32
    the wall clock; `gate` `[B]` int32 is the LISTEN token that has not been run yet (-1: none); `own` `[B, 80]` uint8
    is the last frame of own speech, `spoke` `[B]` whether the last micro-turn spoke; `voice` the vocoder's state; `key`
    `[B, 2]` uint32 seeds each session's sampling.
    """

    layers: Any  # from `Backbone.init_state`
    position: jax.Array
    turn: jax.Array
    week_ms: jax.Array
    gate: jax.Array
    own: jax.Array
    spoke: jax.Array
    voice: dict[str, Any]
    key: jax.Array


class MicroTurnInputs(NamedTuple):
    """What one micro-turn is given, for B slots.

    `bins` `[B, 4, 80]` uint8 user dMel frames; `typed` `[B, N]` int32 with `typed_length` `[B]` (a TYPED or BACKGROUND
    token first); `patches` `[B, P, 2, 40, 40, 3]` float32 with `patch_count` `[B]`; `active` `[B]` bool: slots that
    are not active keep their state and give silence.
    """

    bins: jax.Array
    typed: jax.Array
    typed_length: jax.Array
    patches: jax.Array
    patch_count: jax.Array
    active: jax.Array


class MicroTurnOutputs(NamedTuple):
    """What one micro-turn gives.

    `wave` `[B, 3200]` float32, to be heard one micro-turn later; `tokens` `[B, G]` int32 and `count` `[B]`: the
    generated tokens in order, the gate token last; `speaking` `[B]` bool; `p_speak` `[B]` float32; `frames`
    `[B, 4, 80]` uint8, the own frames fed back; `logits` `[B, G, V]` only where the step was built with `trace`.
    """

    wave: jax.Array
    tokens: jax.Array
    count: jax.Array
    speaking: jax.Array
    p_speak: jax.Array
    frames: jax.Array
    logits: jax.Array | None


PART = 6  # sessions that a CPU works on at a time

# Phases of a slot within a micro-turn.
_START, _HEARD, _TEXT, _OWN, _DONE = range(5)


class Duplex:
    """The step of one model. Holds shapes and limits, never arrays."""

    def __init__(self, model: InteractionModel, trace: bool = False, platform: str | None = None):
        """
        Args:
          model: whose step it is, placed on a mesh or on one device.
          trace: give the logits of generated tokens too.
          platform: "cpu", "tpu" or "cuda", where the step is to run; that of the default device, if not given.
        """
        platform = platform or jax.extend.backend.get_default_device().platform
        self.model = model
        self.config = model.config.duplex
        self.trace = trace
        self.dtype = jnp.dtype(model.config.serve.compute_dtype)
        self.sessions = model.placement.session_axes
        c = self.config
        # HEARD and SAY open their parts, and the gate closes the micro-turn.
        self.generated = (c.max_heard + 1 if c.heard else 0) + c.max_text + 1 + 1
        self.narrow = 2 + FRAMES_PER_MICRO_TURN
        self.wide = self.narrow + c.max_typed + c.max_patches
        self.one_cpu = platform == "cpu" and model.placement.mesh.devices == 1

    def check_sessions(self, batch: int) -> None:
        """Raises `InputError` where the mesh cannot share `batch` sessions."""
        mesh, parts = self.model.placement.mesh, self.model.placement.session_shards
        if batch % parts:
            raise InputError(f"{batch} sessions do not divide into {parts} parts, of mesh {mesh}: serve more, or fewer")

    def prepare(self, params: Params) -> Params:
        """Parameters as the step reads them: in the compute dtype but for the router, whose scores are float32; routed
        experts in int8 where the placement says so."""

        int8 = self.model.placement.int8

        def one(spec: ParamSpec, array: jax.Array) -> jax.Array:
            if int8 and "expert" in spec.axes:
                return array
            return array.astype(jnp.float32 if "router" in spec.axes else self.dtype)

        table = self.model.serving_specs()
        params = {name: params[name] for name in table}
        ready = jax.tree.map(one, table, quantise_experts(params) if int8 else params)
        return {**ready, "layers": self.model.backbone.prepare_for_serving(ready["layers"])}

    def layouts(self) -> tuple[Any, Any, Any]:
        """Where on a mesh parameters (as prepared), state and inputs lie: trees of `PartitionSpec`."""
        split, mesh = PartitionSpec(self.sessions), self.model.placement.mesh
        params = partition_specs(self.model.serving_specs(), mesh, SERVE)
        state = jax.tree.map(lambda _: split, jax.eval_shape(lambda: self.init_state(1)))
        state = state._replace(layers=self.model.backbone.state_partition_specs(self.sessions))
        inputs = jax.tree.map(lambda _: split, jax.eval_shape(lambda: self.empty_inputs(1)))
        return params, state, inputs

    def init_state(self, batch: int, seed: int = 0, week_ms: int = 0) -> DuplexState:
        """State of `batch` sessions that have not begun. Session i samples with the key (seed, i)."""
        zeros = jnp.zeros((batch,), jnp.int32)
        keys = jnp.stack([jnp.full((batch,), seed, jnp.uint32), jnp.arange(batch, dtype=jnp.uint32)], axis=1)
        state = DuplexState(
            layers=self.model.backbone.init_state(batch, self.wide, self.dtype),
            position=zeros,
            turn=zeros,
            week_ms=zeros + week_ms,
            gate=zeros - 1,
            own=jnp.broadcast_to(SILENT_BINS, (batch, N_MELS)),
            spoke=jnp.zeros((batch,), bool),
            voice=vocoder.init_state(self.model.config.vocoder, batch),
            key=keys,
        )
        return jax.tree.map(jnp.copy, state)  # a donated state may not hold one buffer twice

    def begin(self, state: DuplexState, slot: jax.Array, key: jax.Array, week_ms: jax.Array) -> DuplexState:
        """`state` with a session that begins in `slot` (int32), whatever was there: its sampling from `key` `[2]`
        uint32, the wall clock at `week_ms` (int32)."""
        fresh = self.init_state(1)._replace(key=key[None], week_ms=week_ms[None])

        def one(axis: int, whole: jax.Array, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, row, slot, axis)

        return jax.tree.map(one, self._session_dims(), state, fresh)

    def moved(self, state: DuplexState, rows: jax.Array) -> DuplexState:
        """The sessions in slots `rows` `[B']` int32 of a state, as a state of their own."""
        return jax.tree.map(lambda axis, whole: jnp.take(whole, rows, axis=axis), self._session_dims(), state)

    def _session_dims(self) -> DuplexState:
        """Which dimension of each array of a state counts its sessions: the one that differs for one and two."""
        one, two = jax.eval_shape(lambda: (self.init_state(1), self.init_state(2)))
        return jax.tree.map(lambda a, b: [x == y for x, y in zip(a.shape, b.shape, strict=True)].index(False), one, two)

    def empty_inputs(self, batch: int) -> MicroTurnInputs:
        """Inputs of a micro-turn in which nothing is heard, typed or seen."""
        c = self.config
        zeros = jnp.zeros((batch,), jnp.int32)
        return MicroTurnInputs(
            bins=jnp.zeros((batch, FRAMES_PER_MICRO_TURN, N_MELS), jnp.uint8),
            typed=jnp.zeros((batch, c.max_typed), jnp.int32),
            typed_length=zeros,
            patches=jnp.zeros((batch, c.max_patches, 2, 40, 40, 3), jnp.float32),
            patch_count=zeros,
            active=jnp.ones((batch,), bool),
        )

    def shapes(self, batch: int, mesh: Mesh | None = None) -> tuple[DuplexState, MicroTurnInputs]:
        """State and inputs of `batch` slots as `jax.ShapeDtypeStruct`s, with their places on the mesh."""
        shapes = jax.eval_shape(lambda: (self.init_state(batch), self.empty_inputs(batch)))
        if mesh is None:
            return shapes

        def placed(a: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, shapes, self.layouts()[1:])

    def compiled(
        self, params: Params, batch: int, mesh: Mesh | None = None
    ) -> Callable[[Params, DuplexState, MicroTurnInputs], Any]:
        """The step compiled ahead of time for `batch` slots; state is donated. It can never recompile.

        On a mesh (which is set), what it gives is whole on every device: any process can read it.
        """

        def everywhere(
            params: Params, state: DuplexState, inputs: MicroTurnInputs
        ) -> tuple[DuplexState, MicroTurnOutputs]:
            state, outputs = self.step(params, state, inputs)
            return state, jax.tree.map(lambda a: jax.sharding.reshard(a, PartitionSpec()), outputs)

        step = self.step if mesh is None else everywhere
        return jax.jit(step, donate_argnums=1).lower(params, *self.shapes(batch, mesh)).compile()

    def step(self, params: Params, state: DuplexState, inputs: MicroTurnInputs) -> tuple[DuplexState, MicroTurnOutputs]:
        """One micro-turn. `params` from `prepare`; `state` from `init_state` or the step before.

        On a mesh (under `jax.set_mesh`), one program per device, each with its share of the sessions.
        """
        if self.model.placement.mesh.devices == 1:
            return self._step(params, state, inputs)
        given = self.layouts()
        outputs = (given[1], PartitionSpec(self.sessions))
        local = jax.shard_map(self._step, in_specs=given, out_specs=outputs, check_vma=False)
        return local(params, state, inputs)

    def _step(
        self, params: Params, state: DuplexState, inputs: MicroTurnInputs
    ) -> tuple[DuplexState, MicroTurnOutputs]:
        active = inputs.active
        ringing = state.spoke
        state, hidden = self._prefill(params, state, inputs)
        state, out = self._generate(params, state, hidden, active)
        speaking = state.spoke & active
        state, wave = self._vocode(params, state, out.fine, speaking, active & (speaking | ringing))
        state = state._replace(
            turn=state.turn + active,
            week_ms=(state.week_ms + MICRO_TURN_MS * active) % WEEK_MS,
        )
        logits = out.logits if self.trace else None
        return state, MicroTurnOutputs(wave, out.tokens, out.count, speaking, out.p_speak, out.frames, logits)

    def _any(self, mask: jax.Array) -> jax.Array:
        """Whether it holds for any session of the slice: all its devices have to take part in what follows, also those
        of `tensor`, whose sessions are the same but for what rounding may do."""
        mesh = self.model.placement.mesh
        return psum(jnp.any(mask).astype(jnp.int32), mesh, ("data", "expert", "tensor")) > 0

    def _forward(
        self, params: Params, state: DuplexState, x: jax.Array, length: jax.Array
    ) -> tuple[DuplexState, jax.Array]:
        """Runs `x` `[B, T, D]` of which `length` are real; returns the normed hidden state of the last real one."""
        y, layers = self.model.backbone.forward_cached(params["layers"], x, state.layers, state.position, length)
        last = jnp.take_along_axis(y, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
        hidden = self.model.bind(params).norm(last)
        return state._replace(layers=layers, position=state.position + length), hidden

    def _prefill(self, params: Params, state: DuplexState, inputs: MicroTurnInputs) -> tuple[DuplexState, jax.Array]:
        trunk = self.model.bind(params)
        batch = inputs.bins.shape[0]
        base = self.config.control_base
        clock = trunk.clock(clock_features(state.turn, state.week_ms, jnp), self.dtype)
        turn = trunk.embed(jnp.full((batch,), base + Control.TURN), self.dtype) + clock
        gate = trunk.embed(jnp.maximum(state.gate, 0), self.dtype)
        user = trunk.audio(inputs.bins, self.dtype)
        has_gate = state.gate >= 0
        yes = jnp.ones((batch, 1), bool)

        def narrow(carry: tuple[DuplexState, jax.Array]) -> tuple[DuplexState, jax.Array]:
            parts = [(gate[:, None], has_gate[:, None]), (turn[:, None], yes), (user, yes)]
            return self._forward_parts(params, carry[0], parts, inputs.active)

        def wide(carry: tuple[DuplexState, jax.Array]) -> tuple[DuplexState, jax.Array]:
            typed = trunk.embed(inputs.typed, self.dtype)
            parts = [
                (gate[:, None], has_gate[:, None]),
                (turn[:, None], yes),
                (typed, jnp.arange(typed.shape[1]) < inputs.typed_length[:, None]),
            ]
            if self.config.max_patches:
                flat = inputs.patches.reshape(-1, *inputs.patches.shape[2:])
                seen = trunk.visual(flat, self.dtype).reshape(batch, self.config.max_patches, -1)
                parts.append((seen, jnp.arange(seen.shape[1]) < inputs.patch_count[:, None]))
            parts.append((user, yes))
            return self._forward_parts(params, carry[0], parts, inputs.active)

        more = self._any(inputs.active & ((inputs.typed_length > 0) | (inputs.patch_count > 0)))
        carry = (state, jnp.zeros((batch, self.model.config.backbone.d_model), self.dtype))
        state, hidden = self._one_of(more, wide, narrow, carry)
        return state._replace(gate=jnp.where(inputs.active, -1, state.gate)), hidden

    def _forward_parts(
        self, params: Params, state: DuplexState, parts: list[tuple[jax.Array, jax.Array]], active: jax.Array
    ) -> tuple[DuplexState, jax.Array]:
        """Joins parts `([B, n, D], [B, n or 1] present)`, moves what is present to the left and runs it."""
        x = jnp.concatenate([part for part, _ in parts], axis=1)
        present = jnp.concatenate([jnp.broadcast_to(there, part.shape[:2]) for part, there in parts], axis=1)
        order = jnp.argsort(~present, axis=1, stable=True)
        x = jnp.take_along_axis(x, order[..., None], axis=1)
        return self._forward(params, state, x, jnp.where(active, present.sum(axis=1), 0).astype(jnp.int32))

    def _generate(
        self, params: Params, state: DuplexState, hidden: jax.Array, active: jax.Array
    ) -> tuple[DuplexState, _Generated]:
        """Text, gate and own speech, one position at a time, until every slot has its micro-turn.

        Slots advance on their own: one may speak its second frame while another still writes what it heard.
        """
        batch = hidden.shape[0]
        vocab = self.model.config.backbone.vocab_size
        trunk = self.model.bind(params)
        out = _Generated(
            tokens=jnp.zeros((batch, self.generated), jnp.int32),
            count=jnp.zeros((batch,), jnp.int32),
            p_speak=jnp.zeros((batch,), jnp.float32),
            logits=jnp.zeros((batch, self.generated, vocab if self.trace else 0), jnp.float32),
            fine=jnp.broadcast_to(SILENT_FINE, (batch, FRAMES_PER_MICRO_TURN, FINE_PER_FRAME, N_MELS)).reshape(
                batch, FRAMES_PER_MICRO_TURN, -1
            ),
            frames=jnp.broadcast_to(SILENT_BINS, (batch, FRAMES_PER_MICRO_TURN, N_MELS)),
        )
        state = state._replace(own=jnp.where((state.spoke | ~active)[:, None], state.own, SILENT_BINS))
        progress = _Progress(jnp.where(active, _START, _DONE), jnp.zeros((batch,), jnp.int32))
        progress, state, out, token = self._write(params, progress, state, out, hidden)

        def unfinished(carry: tuple) -> jax.Array:
            return self._any(carry[0].phase != _DONE)

        def body(carry: tuple) -> tuple:
            progress, state, out, token = carry
            # token -1: the next position holds own speech
            own = trunk.audio(state.own, self.dtype) + trunk.own[...].astype(self.dtype)
            x = jnp.where((token < 0)[:, None], own, trunk.embed(jnp.maximum(token, 0), self.dtype))
            running = progress.phase != _DONE
            state, hidden = self._forward(params, state, x[:, None], running.astype(jnp.int32))
            speaking = progress.phase == _OWN
            progress, state, out = self._say(params, progress, state, out, hidden)
            progress, state, out, token = self._write(params, progress, state, out, hidden)
            return progress, state, out, jnp.where(speaking, -1, token)

        def finished(carry: tuple) -> tuple:
            return jax.lax.while_loop(unfinished, body, carry)

        carry = (progress, state, out, token)
        first = jax.tree.map(lambda _: 0, carry)
        axes = (first[0], self._session_dims(), *first[2:])
        running = progress.phase != _DONE
        # Who speaks takes many rounds: together with others who do, a part takes no longer.
        order = jnp.where(running, ~(state.spoke | (progress.phase > _HEARD)), 2)
        _, state, out, _ = self._in_parts(finished, carry, axes, order)
        return state, out

    def _one_of(self, wanted: jax.Array, run: Callable[[Any], Any], otherwise: Callable[[Any], Any], carry: Any) -> Any:
        """`lax.cond`. On a CPU, XLA copies all that passes through one, the keys and values of all sessions: there it
        is loops of one round at most, which work on them where they are."""
        if not self.one_cpu:
            return jax.lax.cond(wanted, run, otherwise, carry)

        def once(wanted: jax.Array, run: Callable[[Any], Any], carry: Any) -> Any:
            return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), run(c[1])), (wanted, carry))[1]

        return once(~wanted, otherwise, once(wanted, run, carry))

    def _in_parts(self, run: Callable[[Any], Any], carry: Any, axes: Any, order: jax.Array) -> Any:
        """`run(carry)`, in which nothing is to be done but for the slots of `order` `[B]` 0 and 1, and that once.

        On a CPU, whose time is that of the rows, for `PART` of those at a time, those of 0 first: always as many, so
        that what a session gets does not depend on how many there are. `axes` says which dimension of an array of
        `carry` counts sessions.
        """
        if len(order) <= PART or not self.one_cpu:
            return run(carry)

        def body(loop: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            carry, order = loop
            rows = jnp.argsort(order, stable=True)[:PART]
            part = run(jax.tree.map(lambda axis, whole: jnp.take(whole, rows, axis=axis), axes, carry))
            carry = jax.tree.map(partial(_put_rows, rows), axes, carry, part)
            return carry, order.at[rows].set(2)

        return jax.lax.while_loop(lambda loop: jnp.any(loop[1] < 2), body, (carry, order))[0]

    def _write(
        self, params: Params, progress: _Progress, state: DuplexState, out: _Generated, hidden: jax.Array
    ) -> tuple[_Progress, DuplexState, _Generated, jax.Array]:
        """Chooses the next token where text is being written. SPEAK leads to own speech, LISTEN ends the micro-turn."""
        base = self.config.control_base
        phase, used = progress
        writing = (phase != _OWN) & (phase != _DONE)
        logits = self.model.logits(params, hidden)
        token, p_speak = self._choose(logits, phase, used, state, out.count)
        rows, column = jnp.arange(hidden.shape[0]), jnp.where(writing, out.count, self.generated)
        out = out._replace(
            tokens=out.tokens.at[rows, column].set(token, mode="drop"),
            count=out.count + writing,
            p_speak=jnp.where(writing, p_speak, out.p_speak),
            logits=out.logits.at[rows, column].set(logits, mode="drop") if self.trace else out.logits,
        )
        heard, say = token == base + Control.HEARD, token == base + Control.SAY
        listen, speak = token == base + Control.LISTEN, token == base + Control.SPEAK
        after = jnp.select([heard, say, listen, speak], [_HEARD, _TEXT, _DONE, _OWN], phase)
        progress = _Progress(
            jnp.where(writing, after, phase), jnp.where(writing, jnp.where(heard | say | speak, 0, used + 1), used)
        )
        # LISTEN is run as the first position of the next micro-turn.
        state = state._replace(
            gate=jnp.where(writing & listen, token, state.gate), spoke=jnp.where(writing, speak, state.spoke)
        )
        return progress, state, out, token

    def _say(
        self, params: Params, progress: _Progress, state: DuplexState, out: _Generated, hidden: jax.Array
    ) -> tuple[_Progress, DuplexState, _Generated]:
        """Flow head where own speech is under way. `used` counts own positions fed: 0 has run the SPEAK token only."""
        flow = self.model.config.flow
        phase, used = progress
        speaking = phase == _OWN
        ready = speaking & (used > 0)

        def run(own: jax.Array, fine: jax.Array, frames: jax.Array) -> tuple[jax.Array, ...]:
            keys = _keys(state, self.generated + used)
            noise = jax.vmap(lambda key: jax.random.normal(key, (SPEECH_DIM,), self.dtype))(keys)
            mels = self.model.bind(params).flow.sample(hidden, flow.temperature * noise, flow.steps)
            mels = mels.astype(jnp.float32)
            bins = quantise_jax(mels[:, :N_MELS]).astype(jnp.uint8)
            rows, column = jnp.arange(hidden.shape[0]), jnp.where(ready, used - 1, FRAMES_PER_MICRO_TURN)
            fine = fine.at[rows, column].set(mels[:, N_MELS:], mode="drop")
            frames = frames.at[rows, column].set(bins, mode="drop")
            return jnp.where(ready[:, None], bins, own), fine, frames

        own, fine, frames = jax.lax.cond(jnp.any(ready), run, lambda *same: same, state.own, out.fine, out.frames)
        state, out = state._replace(own=own), out._replace(fine=fine, frames=frames)
        ended = speaking & (used == FRAMES_PER_MICRO_TURN)
        return _Progress(jnp.where(ended, _DONE, phase), used + speaking), state, out

    def _choose(
        self, logits: jax.Array, phase: jax.Array, used: jax.Array, state: DuplexState, index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Next token of each slot within the grammar of a micro-turn, and P(speak) against P(listen)."""
        c = self.config
        base = c.control_base
        ids = jnp.arange(logits.shape[1])
        is_text = ids < base
        room_heard = (phase == _HEARD) & (used < c.max_heard)
        room_text = (phase == _TEXT) & (used < c.max_text)
        allowed = is_text & (room_heard | room_text)[:, None]
        delegation = (ids == base + Control.DELEGATE) | (ids == base + Control.END)
        allowed |= delegation & room_text[:, None]
        if c.heard:
            allowed |= (ids == base + Control.HEARD) & (phase == _START)[:, None]
        allowed |= (ids == base + Control.SAY) & (phase != _TEXT)[:, None]
        allowed |= (ids == base + Control.LISTEN) | (ids == base + Control.SPEAK)
        masked = jnp.where(allowed, logits, -jnp.inf)
        listen, speak = logits[:, base + Control.LISTEN], logits[:, base + Control.SPEAK]
        p_speak = jax.nn.sigmoid(speak - listen)
        sampled = c.temperature > 0
        token = self._sample(masked / c.temperature, state, index) if sampled else jnp.argmax(masked, axis=1)
        is_gate = (token == base + Control.LISTEN) | (token == base + Control.SPEAK)
        gate = base + jnp.where(p_speak > c.gate_threshold, Control.SPEAK, Control.LISTEN)
        return jnp.where(is_gate, gate, token).astype(jnp.int32), p_speak

    def _sample(self, logits: jax.Array, state: DuplexState, index: jax.Array) -> jax.Array:
        """Top-p sampling (Holtzman et al., 2020); each slot draws from its own key, turn and index."""
        if self.config.top_p < 1.0:
            order = jnp.sort(logits, axis=1, descending=True)
            probability = jax.nn.softmax(order, axis=1)
            kept = jnp.cumsum(probability, axis=1) - probability < self.config.top_p
            least = jnp.min(jnp.where(kept, order, jnp.inf), axis=1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        keys = _keys(state, index)
        return jax.vmap(jax.random.categorical)(keys, logits)

    def _vocode(
        self,
        params: Params,
        state: DuplexState,
        fine: jax.Array,
        speaking: jax.Array,
        running: jax.Array,
    ) -> tuple[DuplexState, jax.Array]:
        """The waveform of `running` slots: those that speak, and one micro-turn longer, so that a cut voice rings out.

        Then the voice starts afresh, at once: when it does must not depend on whether another slot runs the vocoder.
        """
        config = self.model.config.vocoder
        batch = running.shape[0]
        frames = fine.reshape(batch, FINE_PER_MICRO_TURN, N_MELS)

        def some(part: tuple[Any, ...]) -> tuple[Any, ...]:
            voice, wave, frames, running, speaking = part
            fresh = vocoder.init_state(config, len(running))
            new, found = vocoder.vocode(config, params["vocoder"], voice, frames)
            voice = _where(running, _where(speaking, new, fresh), voice)
            return voice, jnp.where(running[:, None], found, wave), frames, jnp.zeros_like(running), speaking

        silence = jnp.zeros((batch, MICRO_TURN_SAMPLES), jnp.float32)
        carry = (state.voice, silence, frames, running, speaking)
        axes = jax.tree.map(lambda _: 0, carry)
        carry = self._one_of(
            jnp.any(running), lambda carry: self._in_parts(some, carry, axes, 2 * ~running), lambda carry: carry, carry
        )
        return state._replace(voice=carry[0]), carry[1]


def _put_rows(rows: jax.Array, axis: int, whole: jax.Array, part: jax.Array) -> jax.Array:
    """`whole` with `part` as its `rows` along `axis`, one after the other: whole rows are copied where they lie."""

    def one(i: jax.Array, whole: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(part, i, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(whole, row, rows[i], axis)

    return jax.lax.fori_loop(0, len(rows), one, whole)


class _Generated(NamedTuple):
    """What a micro-turn has given so far; `fine` `[B, 4, 320]`, `frames` `[B, 4, 80]` are silence where none is."""

    tokens: jax.Array
    count: jax.Array
    p_speak: jax.Array
    logits: jax.Array
    fine: jax.Array
    frames: jax.Array


class _Progress(NamedTuple):
    """Per slot: the phase, and how many tokens (or own positions) it has used of it."""

    phase: jax.Array
    used: jax.Array


def _keys(state: DuplexState, index: jax.Array) -> jax.Array:
    """One key per slot from its seed, its micro-turn and `index` `[B]`: independent of batch and slot."""
    base = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    fold = jax.vmap(lambda key, turn, i: jax.random.fold_in(jax.random.fold_in(key, turn), i))
    return fold(base, state.turn, index)


@partial(jax.jit, inline=True)
def _where(mask: jax.Array, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Per slot: `a` where `mask`, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)
