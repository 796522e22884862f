"""The clock features of a micro-turn (200 ms): how long the session has lasted, and the time of day and week.

Both times are given as phases: the position inside a period, as a fraction of the period. The phases are computed from
integer remainders, so they stay exact after days.

The functions work on NumPy and on JAX integers alike, so that the data pipeline (`jaxtml.stream.encoding`) and the
compiled step (`jaxtml.model.duplex`) share one definition.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)

SESSION_PERIODS = tuple(4**k for k in range(1, 11))
"""Periods of the session's phases in micro-turns: 0.8 s to 58 h."""

WALL_PERIODS_MS = (60_000, 3_600_000, 43_200_000, 86_400_000, 604_800_000)
"""Periods of the wall clock's phases: a minute, an hour, half a day, a day, a week."""

CLOCK_FEATURES = 2 * len(SESSION_PERIODS) + 2 * len(WALL_PERIODS_MS) + 2
"""Sine and cosine of each phase, the age of the session, and a constant."""

WEEK_MS = 604_800_000


def clock_features(micro_turn: Array, week_ms: Array, xp: ModuleType = np) -> Array:
    """Returns the clock features `[..., CLOCK_FEATURES]` float32.

    Args:
      micro_turn: `[...]` integers, micro-turns since the session began.
      week_ms: `[...]` integers, milliseconds since Monday 00:00 of the wall clock.
      xp: `numpy` for NumPy arrays, `jax.numpy` for JAX arrays.
    """
    session: list[Any] = [(micro_turn % period) / period for period in SESSION_PERIODS]
    wall: list[Any] = [(week_ms % period) / period for period in WALL_PERIODS_MS]
    angle = 2 * np.pi * xp.stack(session + wall, axis=-1).astype(xp.float32)
    age = xp.log2(1.0 + micro_turn.astype(xp.float32))[..., None] / 20.0
    return xp.concatenate([xp.sin(angle), xp.cos(angle), age, xp.ones_like(age)], axis=-1).astype(xp.float32)


def week_ms(wall_clock_s: float) -> int:
    """Returns the milliseconds since the last Monday 00:00 UTC.

    Args:
      wall_clock_s: seconds since the Unix epoch. The epoch began on a Thursday.
    """
    return int(round((wall_clock_s + 3 * 86_400) * 1000)) % WEEK_MS
