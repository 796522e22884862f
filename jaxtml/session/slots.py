"""`Slots`: the live sessions of a server. Each session has a slot of one batch.

Sessions may begin and end between any two micro-turns (a micro-turn is 200 ms). There is one compiled step per bucket
(a batch size), and the sessions are in the smallest bucket that has room. When a new session finds no room, all
sessions move to a larger bucket. They move to the next smaller bucket when they fill no more than half of it. The
server calls this module. Everything is compiled at the start; nothing compiles later.

Within a bucket, neither the slot nor the other sessions change any bit of a session's output. Another bucket rounds
sums differently. In the tests the sound then differs by 1e-4 at most. Where two tokens almost tie in sampling,
the session may go on with the other token (EXPERIMENTS.md says how often).

On a CPU the sessions are in several groups (`slot_groups`), each with a clock of its own. On a CPU a step of twice as
many sessions takes twice as long, and all these sessions wait for its end. With a single group, a step in which many
sessions speak would still run when the next step is due. A group has one bucket, because free slots cost next to
nothing on a CPU. So on a CPU, other sessions never change any bit of a session's output.

Axes: n generated tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.errors import InputError
from jaxtml.model.duplex.cpu_batches import CPU_BATCH
from jaxtml.model.duplex.state import DuplexState
from jaxtml.session.engine import Engine
from jaxtml.session.records import SlotInput, SlotOutput

BUCKETS = (1, 4, 16, 64)
"""Batch sizes below the capacity. The step is compiled for each of them at the start."""

StateProgram = Callable[..., DuplexState]
"""A compiled function that returns a state."""


class Slots:
    """The live sessions of one engine. Only one thread may call it.

    Args:
      engine: the loaded model.
      capacity: the most sessions at a time.
      buckets: batch sizes below the capacity. A mesh splits the sessions into `Placement.session_shards` parts; each
        size counts the sessions of one part.

    Attributes:
      live: session number -> slot.
      bucket: the present batch size.
      state: of all slots.

    Raises:
      InputError: the capacity is below one, or the mesh cannot split it into equal parts.
    """

    def __init__(self, engine: Engine, capacity: int, buckets: Sequence[int] = BUCKETS):
        if capacity < 1:
            raise InputError(f"{capacity} sessions: give room for one session at least")
        self.engine, self.capacity = engine, capacity
        engine.duplex.check_sessions(capacity)
        parts = engine.duplex.model.placement.session_shards
        self.buckets = (*(parts * size for size in buckets if parts * size < capacity), capacity)
        self._empty = {size: engine.empty_inputs(size) for size in self.buckets}
        self._begin_programs, self._move_programs = self._compile_programs()
        self._reset()

    def _reset(self) -> None:
        self.live: dict[int, int] = {}
        self.bucket = self.buckets[0]
        self.state: DuplexState = self.engine.init_state(self.bucket)

    def empty_copy(self) -> Slots:
        """Returns `Slots` of the same size without any session. They share the compiled programs."""
        other = copy.copy(self)
        other._reset()
        return other

    def _compile_programs(self) -> tuple[dict[int, StateProgram], dict[tuple[int, int], StateProgram]]:
        """Compiles everything that a server runs: the steps, and the programs that begin and move sessions.

        The step of each bucket also runs once, as a warm-up.

        Returns:
          By bucket, the program that begins a session. By (bucket, other bucket), the program that moves all sessions.
        """
        engine, duplex = self.engine, self.engine.duplex
        begins: dict[int, StateProgram] = {}
        moves: dict[tuple[int, int], StateProgram] = {}
        shapes = {size: duplex.shapes(size, engine.mesh)[0] for size in self.buckets}
        for size in self.buckets:
            begins[size] = engine.compile_for_state(
                duplex.begin_session, shapes[size], *_begin_arguments(0, 0, 0), donated=(0,)
            )
            _, outputs = engine.compiled_step(size)(engine.params, engine.init_state(size), self._empty[size])
            jax.block_until_ready(outputs)
        for pair in zip(self.buckets, self.buckets[1:], strict=False):
            for before, after in (pair, pair[::-1]):
                slots = jax.ShapeDtypeStruct((after,), jnp.int32)
                moves[before, after] = engine.compile_for_state(duplex.take_slots, shapes[before], slots)
        return begins, moves

    def begin(self, session: int, seed: int, week_ms: int) -> None:
        """Begins a session with the next step.

        Args:
          session: the number by which callers know the session.
          seed: of its sampling.
          week_ms: wall clock, in milliseconds since Monday, 00:00 UTC.

        Raises:
          ValueError: there is no room, or the session has begun already.
        """
        if session in self.live:
            raise ValueError(f"session {session} has begun already")
        if len(self.live) >= self.capacity:
            raise ValueError(f"session {session} cannot begin: all {self.capacity} slots are taken")
        if len(self.live) == self.bucket:
            self._move_to(self.buckets[self.buckets.index(self.bucket) + 1])
        slot = min(set(range(self.bucket)) - set(self.live.values()))
        self.state = self._begin_programs[self.bucket](self.state, *_begin_arguments(slot, seed, week_ms))
        self.live[session] = slot

    def end(self, session: int) -> None:
        """Ends a session. Its slot is free from the next step on."""
        del self.live[session]
        # Moving as soon as the smaller bucket has room would move all sessions each time that one comes or goes.
        while (index := self.buckets.index(self.bucket)) and len(self.live) <= max(1, self.buckets[index - 1] // 2):
            self._move_to(self.buckets[index - 1])

    def step(self, given: Mapping[int, SlotInput]) -> dict[int, SlotOutput]:
        """Computes one micro-turn of the sessions in `given`, and returns their outputs. Other sessions stand still."""
        if not given:
            return {}
        slots = {session: self.live[session] for session in given}
        inputs = self.engine.make_inputs(
            self._empty[self.bucket], {slots[session]: slot_input for session, slot_input in given.items()}
        )
        step = self.engine.compiled_step(self.bucket)
        self.state, outputs = step(self.engine.params, self.state, inputs)
        host = jax.device_get(outputs._replace(frames=None, logits=None))  # pyright: ignore[reportArgumentType]
        return {
            session: SlotOutput(
                host.wave[slot],
                host.tokens[slot, : host.count[slot]],
                bool(host.speaking[slot]),
                float(host.p_speak[slot]),
            )
            for session, slot in slots.items()
        }

    def _move_to(self, bucket: int) -> None:
        """Moves all sessions to the first slots of another bucket, in their present order."""
        order = sorted(self.live, key=self.live.__getitem__)
        slots = np.zeros(bucket, np.int32)
        slots[: len(order)] = [self.live[session] for session in order]
        self.state = self._move_programs[self.bucket, bucket](self.state, slots)
        self.live = {session: slot for slot, session in enumerate(order)}
        self.bucket = bucket


def slot_groups(engine: Engine, capacity: int) -> list[Slots]:
    """Returns groups of slots with room for `capacity` sessions, or a few more.

    On a CPU a group has at most `CPU_BATCH` slots. Elsewhere there is one group. Raises `InputError` as `Slots` does.
    """
    if not engine.duplex.one_cpu:
        return [Slots(engine, capacity)]
    groups = max(1, -(-capacity // CPU_BATCH))
    first = Slots(engine, -(-capacity // groups), ())
    return [first, *(first.empty_copy() for _ in range(groups - 1))]


def _begin_arguments(slot: int, seed: int, week_ms: int) -> Sequence[np.ndarray]:
    """Returns slot, key and wall clock as `Duplex.begin_session` takes them.

    With the key (seed, 0) a session samples like the first session of `converse` with this seed.
    """
    return np.asarray(slot, np.int32), np.array([seed, 0], np.uint32), np.asarray(week_ms, np.int32)
