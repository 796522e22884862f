"""Live sessions in the slots of a batch: begun and ended at tick edges, in the smallest compiled batch that has room.

There is one compiled step per bucket. Sessions are moved to another bucket when one begins that has no room, or when
those left fill no more than half of the next smaller one. In a bucket, what a session gives does not depend by a bit on
the slot or on who else is there. In another one sums are rounded otherwise: sound by 1e-4 at most, in the tests, and
where something was sampled as near as that to something else, the session goes on with that (EXPERIMENTS.md says how
often). Everything is compiled at the start: from then on nothing is. Called by the server.

On a CPU the sessions are in several groups, each with a clock of its own: a step of twice as many takes twice as long
there, all of them wait for its end, and a tick in which many speak is late before the next can begin. A group has one
bucket, as slots that nobody has cost next to nothing there: who else is connected never changes a bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.errors import InputError
from jaxtml.model.duplex.cpu_batches import CPU_BATCH
from jaxtml.model.duplex.state import DuplexState
from jaxtml.session.engine import Engine, SlotInput

BUCKETS = (1, 4, 16, 64)  # below the capacity; each is compiled at the start


@dataclass(frozen=True)
class SlotOutput:
    """What one session gave: `wave` `[3200]` float32 at 16 kHz, to be heard one micro-turn later; the generated
    `tokens` `[n]` int32, the gate last."""

    wave: np.ndarray
    tokens: np.ndarray
    speaking: bool
    p_speak: float


class Slots:
    """The sessions of one engine; one thread calls.

    Args:
      engine: the loaded model.
      capacity: sessions at most.
      buckets: below the capacity, for each part of the mesh that has sessions of its own.

    Raises:
      InputError: a capacity below one, or that the mesh cannot share.
    """

    def __init__(self, engine: Engine, capacity: int, buckets: Sequence[int] = BUCKETS):
        if capacity < 1:
            raise InputError(f"{capacity} sessions: a server has room for one at least")
        self.engine, self.capacity = engine, capacity
        engine.duplex.check_sessions(capacity)
        parts = engine.duplex.model.placement.session_shards
        self.buckets = (*(parts * size for size in buckets if parts * size < capacity), capacity)
        self._empty = {size: engine.empty(size) for size in self.buckets}
        self._begins, self._moves = self._compiled()
        self._clear()

    def _clear(self) -> None:
        self.live: dict[int, int] = {}  # session -> slot
        self.bucket = self.buckets[0]
        self.state: DuplexState = self.engine.state(self.bucket)

    def another(self) -> Slots:
        """As many slots for other sessions, with the same compiled programs."""
        other = copy.copy(self)
        other._clear()
        return other

    def _compiled(self) -> tuple[dict[int, Any], dict[tuple[int, int], Any]]:
        """All programs that will ever run, beside the engine's steps; each step has run once."""
        engine, begins, moves = self.engine, {}, {}
        shapes = {size: engine.duplex.shapes(size, engine.mesh)[0] for size in self.buckets}
        for size in self.buckets:
            begins[size] = engine.compiled(
                engine.duplex.begin_session, shapes[size], *_beginning(0, 0, 0), donated=(0,)
            )
            _, outputs = engine.step(size)(engine.params, engine.state(size), self._empty[size])
            jax.block_until_ready(outputs)
        for pair in zip(self.buckets, self.buckets[1:], strict=False):
            for before, after in (pair, pair[::-1]):
                rows = jax.ShapeDtypeStruct((after,), jnp.int32)
                moves[before, after] = engine.compiled(engine.duplex.take_slots, shapes[before], rows)
        return begins, moves

    def begin(self, session: int, seed: int, week_ms: int) -> None:
        """Begins one at the next step. Raises `ValueError` where there is no room or it is there already."""
        if session in self.live or len(self.live) >= self.capacity:
            raise ValueError(f"session {session} cannot begin beside {len(self.live)} of {self.capacity}")
        if len(self.live) == self.bucket:
            self._move_to(self.buckets[self.buckets.index(self.bucket) + 1])
        slot = min(set(range(self.bucket)) - set(self.live.values()))
        self.state = self._begins[self.bucket](self.state, *_beginning(slot, seed, week_ms))
        self.live[session] = slot

    def end(self, session: int) -> None:
        """Its slot is free from the next step on."""
        del self.live[session]
        # Not as soon as it would fit: sessions that come and go at the edge would be moved each time.
        while (at := self.buckets.index(self.bucket)) and len(self.live) <= max(1, self.buckets[at - 1] // 2):
            self._move_to(self.buckets[at - 1])

    def step(self, given: Mapping[int, SlotInput]) -> dict[int, SlotOutput]:
        """One micro-turn of the sessions in `given`; the others stay as they are."""
        if not given:
            return {}
        slots = {session: self.live[session] for session in given}
        inputs = self.engine.inputs(self._empty[self.bucket], {slots[session]: one for session, one in given.items()})
        self.state, outputs = self.engine.step(self.bucket)(self.engine.params, self.state, inputs)
        host = jax.device_get(outputs._replace(frames=None, logits=None))
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
        """Moves all sessions, in the order of their slots, to the first ones of another bucket."""
        order = sorted(self.live, key=self.live.__getitem__)
        rows = np.zeros(bucket, np.int32)
        rows[: len(order)] = [self.live[session] for session in order]
        self.state = self._moves[self.bucket, bucket](self.state, rows)
        self.live = {session: slot for slot, session in enumerate(order)}
        self.bucket = bucket


def slot_groups(engine: Engine, capacity: int) -> list[Slots]:
    """Slots for `capacity` sessions or a few more: on a CPU in groups of `CPU_BATCH` at most, else in one group."""
    if not engine.duplex.one_cpu:
        return [Slots(engine, capacity)]
    groups = max(1, -(-capacity // CPU_BATCH))
    first = Slots(engine, -(-capacity // groups), ())
    return [first, *(first.another() for _ in range(groups - 1))]


def _beginning(slot: int, seed: int, week_ms: int) -> Sequence[np.ndarray]:
    """Slot, key and wall clock as `Duplex.begin_session` takes them. A session samples as `converse` does alone."""
    return np.asarray(slot, np.int32), np.array([seed, 0], np.uint32), np.asarray(week_ms, np.int32)
