"""`SessionBatch`: sessions that begin together and run side by side, one micro-turn (200 ms) after the other.

`converse` runs recordings through it, and a `Session` of the library is a batch of one. The server uses `Slots`
instead, because its sessions come and go.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxtml.model.duplex.state import MicroTurnOutputs
from jaxtml.session.engine import Engine
from jaxtml.session.records import MicroTurn, SlotInput
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control


@dataclass(frozen=True)
class SessionInput:
    """What one session takes in a micro-turn, as samples.

    Attributes:
      samples: `[3200]` float32 at 16 kHz.
      text: token ids; the empty tuple where no text arrives.
      mark: the control token in front of the text. TYPED: the user typed the text. BACKGROUND: anything else, which
        is instructions, tools, an earlier conversation, or results of functions and of the background model. The
        background model is the larger model to which this model delegates requests.
      patches: `[P, 2, 40, 40, 3]` float32, video; None without video.
    """

    samples: np.ndarray
    text: tuple[int, ...] = ()
    mark: Control = Control.TYPED
    patches: np.ndarray | None = None


class SessionBatch:
    """Sessions side by side in one state.

    The constructor compiles the step for this batch size, unless the engine has compiled it already.

    Args:
      engine: the loaded model.
      batch: number of sessions. Session i samples with the key (seed, i). A mesh that splits sessions into parts gets
        as many idle slots as it needs for equal parts.
      seed: of the sampling.
      week_ms: wall clock at the beginning, in milliseconds since Monday, 00:00 UTC.
    """

    def __init__(self, engine: Engine, batch: int, seed: int = 0, week_ms: int = 0):
        self.engine = engine
        self.micro_turns = 0
        parts = engine.duplex.model.placement.session_shards
        slots = -(-batch // parts) * parts
        self._step = engine.compiled_step(slots)
        self._state = engine.init_state(slots, seed, week_ms)
        self._empty = engine.empty_inputs(slots)
        self._dmel = [DmelStream()] * batch
        self._readers = [engine.reader() for _ in range(batch)]

    @property
    def t_ms(self) -> int:
        """When the next micro-turn begins, in milliseconds since the sessions began."""
        return self.micro_turns * MICRO_TURN_MS

    def step(self, inputs: Sequence[SessionInput]) -> tuple[MicroTurnOutputs, tuple[MicroTurn, ...]]:
        """Computes the next micro-turn of all sessions.

        Args:
          inputs: one per session.

        Returns:
          The outputs as host arrays, and one record per session.
        """
        began = time.perf_counter()
        slots = {slot: self._slot_input(slot, given) for slot, given in enumerate(inputs)}
        self._state, outputs = self._step(self.engine.params, self._state, self.engine.make_inputs(self._empty, slots))
        host = jax.device_get(outputs)
        step_ms = round(1000 * (time.perf_counter() - began), 2)
        records = tuple(self._record(host, slot, step_ms) for slot in range(len(inputs)))
        self.micro_turns += 1
        return host, records

    def _slot_input(self, slot: int, given: SessionInput) -> SlotInput:
        self._dmel[slot], bins = self._dmel[slot].step(given.samples)
        return SlotInput(bins, given.text, given.mark, given.patches)

    def _record(self, host: MicroTurnOutputs, slot: int, step_ms: float) -> MicroTurn:
        words = self._readers[slot].read(host.tokens[slot, : host.count[slot]].tolist())
        return MicroTurn(
            t_ms=self.t_ms,
            gate="speak" if host.speaking[slot] else "listen",
            p_speak=round(float(host.p_speak[slot]), 4),
            heard=words.heard,
            text=words.said,
            delegate=words.delegated,
            step_ms=step_ms,
            wave=np.asarray(host.wave[slot]),
        )
