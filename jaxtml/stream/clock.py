"""Clock features of a micro-turn: how long the session has lasted, and the wall clock.

Works on NumPy and JAX integers alike, so the data pipeline and the compiled step share one definition. Phases come from
integer remainders and stay exact after days.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SESSION_PERIODS = tuple(4**k for k in range(1, 11))  # micro-turns: 0.8 s .. 58 h
WALL_PERIODS_MS = (60_000, 3_600_000, 43_200_000, 86_400_000, 604_800_000)
CLOCK_FEATURES = 2 * len(SESSION_PERIODS) + 2 * len(WALL_PERIODS_MS) + 2
WEEK_MS = 604_800_000


def clock_features(turn: Any, week_ms: Any, xp: Any = np) -> Any:
    """Features `[..., CLOCK_FEATURES]` float32.

    Args:
      turn: integer array, micro-turns since the session began.
      week_ms: integer array of the same shape, milliseconds since Monday 00:00 of the wall clock.
      xp: `numpy` or `jax.numpy`.
    """
    phases = [(turn % p) / p for p in SESSION_PERIODS] + [(week_ms % p) / p for p in WALL_PERIODS_MS]
    angle = 2 * np.pi * xp.stack(phases, axis=-1).astype(xp.float32)
    age = xp.log2(1.0 + turn.astype(xp.float32))[..., None] / 20.0
    return xp.concatenate([xp.sin(angle), xp.cos(angle), age, xp.ones_like(age)], axis=-1).astype(xp.float32)


def week_ms(wall_clock_s: float) -> int:
    """Milliseconds since Monday 00:00 UTC of a time given in seconds since the epoch (a Thursday)."""
    return int(round((wall_clock_s + 3 * 86_400) * 1000)) % WEEK_MS
