"""One micro-turn of a server as the forward passes of its traced program: which there are, and how often each runs.

The program is one micro-turn of every session: 200 ms of input and output. It begins with a prefill, which has two
widths. A loop follows, in which sessions write, until the slowest session is done. A round of the loop runs the token
that a session has chosen. It may also run tokens that are guessed to follow (speculative decoding); the model confirms
some of them, and the others are taken back. Speech is made in this loop, one position after the other, or in a branch
of its own, or both.

`MicroTurnProgram` measures these parts in the jaxpr. The number of positions that a part runs says how often the part
has to run. So a change of `model/duplex/step.py` changes the plan by itself.

Called by `planning`, which measures, and by `report`, which computes times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr

from jaxtml.parallel.work import Case, Work, count_jaxpr_work
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN

SPEECH_POSITIONS = 1 + FRAMES_PER_MICRO_TURN
"""Positions of a session that speaks: the token SPEAK and the frames of own speech (`jaxtml.stream.layout`)."""


class Turn(NamedTuple):
    """What happens to one session in a micro-turn.

    Attributes:
      given: whether typed text or pictures come in.
      written: how many text tokens the session writes before the gate.
      speaks: whether the gate opens.
    """

    given: bool
    written: int
    speaks: bool


class Course(NamedTuple):
    """How a micro-turn of a batch goes. Of several sessions, the batch has the maximum of each field.

    Attributes:
      wide: whether the prefill is wide.
      rounds: rounds of the loop.
      speaks: whether any session speaks.
    """

    wide: bool
    rounds: int
    speaks: bool


@dataclass(frozen=True)
class MicroTurnProgram:
    """The parts of the program; the work is that of one device.

    Attributes:
      narrow: the prefill without text and pictures, with everything that every micro-turn does.
      wide: the prefill with the most text and patches, likewise.
      writing: a round of the loop in which no session speaks.
      speaking: a round of the loop in which a session speaks.
      speech: what speaking adds beside the loop.
    """

    narrow: Work
    wide: Work
    writing: Work
    speaking: Work
    speech: Work

    @staticmethod
    def measure(jaxpr: ClosedJaxpr, platform: str, weights: Sequence[bool]) -> MicroTurnProgram:
        """Measures a traced program; the arguments are those of `count_jaxpr_work`."""

        def count(rounds: int, widest: bool, speaks: bool) -> Work:
            return count_jaxpr_work(jaxpr, platform, Case(rounds, widest, speaks), weights)

        narrow, silent = count(0, False, False), count(0, False, True)
        return MicroTurnProgram(
            narrow=narrow,
            wide=count(0, True, False),
            writing=count(1, False, False).minus(narrow),
            speaking=count(1, False, True).minus(silent),
            speech=silent.minus(narrow),
        )

    @property
    def round_positions(self) -> int:
        """Positions of a session in one round of the loop: a chosen token, and tokens that are guessed to follow."""
        return self.writing.positions

    @property
    def speech_rounds(self) -> int:
        """Rounds of the loop that a session needs to speak: for the positions that `speech` does not run."""
        return math.ceil((SPEECH_POSITIONS - self.speech.positions) / self.round_positions)

    def course(self, turn: Turn, confirmed: float) -> Course:
        """Returns how a micro-turn of one session goes.

        Args:
          turn: what happens to the session.
          confirmed: how many guessed tokens the model confirms in a round, in the mean; at most as many as are guessed.
        """
        per_round = 1 + min(confirmed, self.round_positions - 1)
        rounds = math.ceil(turn.written / per_round) + (self.speech_rounds if turn.speaks else 0)
        return Course(turn.given, rounds, turn.speaks)

    def parts(self, course: Course) -> list[tuple[Work, int]]:
        """Returns the parts of a micro-turn, and how often each runs."""
        speaking = min(course.rounds, self.speech_rounds) if course.speaks else 0
        parts = [
            (self.wide if course.wide else self.narrow, 1),
            (self.writing, course.rounds - speaking),
            (self.speaking, speaking),
            (self.speech, int(course.speaks)),
        ]
        return [(work, times) for work, times in parts if times]
