"""One micro-turn of a server as the forward passes of its traced program: which there are, and how often each runs.

The program is one micro-turn of every session: 200 ms of input and output. It begins with a prefill, which has two
widths. A loop follows, in which sessions write, until the slowest session has chosen its gate. A round of the loop runs
the token that a session has chosen, and tokens that are guessed to follow (speculative decoding); the model confirms
some of them, and the others are taken back. A branch follows, which runs if any session speaks.

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
      writing: a round of the loop.
      speech: what is done if a session speaks.
    """

    narrow: Work
    wide: Work
    writing: Work
    speech: Work

    @staticmethod
    def measure(jaxpr: ClosedJaxpr, platform: str, weights: Sequence[bool]) -> MicroTurnProgram:
        """Measures a traced program; the arguments are those of `count_jaxpr_work`."""

        def count(rounds: int, widest: bool, speaks: bool) -> Work:
            return count_jaxpr_work(jaxpr, platform, Case(rounds, widest, speaks), weights)

        narrow = count(0, False, False)
        return MicroTurnProgram(
            narrow=narrow,
            wide=count(0, True, False),
            writing=count(1, False, False).minus(narrow),
            speech=count(0, False, True).minus(narrow),
        )

    @property
    def round_positions(self) -> int:
        """Positions of a session in one round of the loop: a chosen token, and tokens that are guessed to follow."""
        return self.writing.positions

    def course(self, turn: Turn, confirmed: float) -> Course:
        """Returns how a micro-turn of one session goes.

        Args:
          turn: what happens to the session.
          confirmed: how many guessed tokens the model confirms in a round, in the mean; at most as many as are guessed.
        """
        per_round = 1 + min(confirmed, self.round_positions - 1)
        return Course(turn.given, math.ceil(turn.written / per_round), turn.speaks)

    def parts(self, course: Course) -> list[tuple[Work, int]]:
        """Returns the parts of a micro-turn, and how often each runs."""
        parts = [
            (self.wide if course.wide else self.narrow, 1),
            (self.writing, course.rounds),
            (self.speech, int(course.speaks)),
        ]
        return [(work, times) for work, times in parts if times]
