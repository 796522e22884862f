"""What sessions do, as shares of their micro-turns, and how long a batch waits for its slowest session.

The default was measured on generated conversations by `tools/benchmarks/session_mix.py`, which writes such files.
Called by the command line, which reads a mix, and by `report`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtml.errors import InputError
from jaxtml.plan.micro_turn import Course, Turn

DEFAULT = Path(__file__).parents[1] / "assets" / "plan" / "generated_sessions.json"


@dataclass(frozen=True)
class Mix:
    """What sessions do.

    Attributes:
      name: where it comes from.
      shares: for each kind of micro-turn, its share of all micro-turns; together 1.
      confirmed: how many guessed tokens (see `micro_turn`) the model confirms in a round of the loop, in the mean.
    """

    name: str
    shares: Mapping[Turn, float]
    confirmed: float

    @staticmethod
    def read(path: Path) -> Mix:
        """Reads a mix: `{"confirmed": 1.5, "turns": [{"given": false, "written": 0, "speaks": false, "count": 90}]}`.

        Raises:
          InputError: the file is missing, or is no such JSON.
        """
        try:
            return parse_mix(path.name, json.loads(path.read_text()))
        except OSError as error:
            raise InputError(f"mix {path}: {error.strerror}: give a file of tools/benchmarks/session_mix.py") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"mix {path}: it is not what tools/benchmarks/session_mix.py writes ({error!r}): measure a mix with it"
            ) from error


def parse_mix(name: str, content: Mapping[str, Any]) -> Mix:
    """Returns the mix of a parsed file (see `Mix.read`).

    Raises:
      ValueError, TypeError, KeyError: the content is not a mix.
    """
    confirmed = float(content["confirmed"])
    counts: dict[Turn, float] = {}
    for entry in content["turns"]:
        turn, count = Turn(*(entry[name] for name in Turn._fields)), float(entry["count"])
        if [type(value) for value in turn] != [bool, int, bool] or turn.written < 0 or not 0 <= count < math.inf:
            raise ValueError(entry)
        counts[turn] = counts.get(turn, 0) + count
    total = sum(counts.values())
    if not (total > 0 and 0 <= confirmed < math.inf):
        raise ValueError("no micro-turns")
    return Mix(name, {turn: count / total for turn, count in counts.items()}, confirmed)


def batch_shares(mix: Mix, sessions: int, course: Callable[[Turn], Course]) -> dict[Course, float]:
    """Returns how a batch's micro-turns go: the share of each course.

    A batch has the largest value of each field of its sessions' courses, and its sessions are independent. So the
    probability that no session of the batch exceeds a course is a power of the probability for one session.

    Args:
      mix: what one session does.
      sessions: of the batch.
      course: how a micro-turn of one session goes.
    """
    single: dict[Course, float] = {}
    for turn, share in mix.shares.items():
        single[course(turn)] = single.get(course(turn), 0) + share
    rounds = sorted({one.rounds for one in single})

    def within(wide: int, index: int, speaks: int) -> float:
        """Returns the probability that all sessions are within the three limits; a limit below 0 allows nothing."""
        if min(wide, index, speaks) < 0:
            return 0.0
        allowed = (share for one, share in single.items()
                   if one.wide <= wide and one.rounds <= rounds[index] and one.speaks <= speaks)  # fmt: skip
        return sum(allowed) ** sessions

    shares = {}
    for wide, index, speaks in itertools.product((0, 1), range(len(rounds)), (0, 1)):
        # The probability of exactly these maxima, by inclusion and exclusion.
        exact = sum(
            (-1) ** (a + b + c) * within(wide - a, index - b, speaks - c)
            for a, b, c in itertools.product((0, 1), repeat=3)
        )
        if exact > 1e-12:
            shares[Course(bool(wide), rounds[index], bool(speaks))] = exact
    return shares


def quantile(shares: Mapping[float, float], share: float) -> float:
    """Returns the smallest value that a part `share` of the whole does not exceed; `shares` has each value's share."""
    passed = 0.0
    for value in sorted(shares):
        passed += shares[value]
        if passed >= share - 1e-9:
            return value
    return max(shares)
