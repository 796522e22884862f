"""A rate that somebody is held to. Called by what reads from clients."""

from __future__ import annotations

import time


class TokenBucket:
    """So much a second, and a burst of so much at once (a token bucket)."""

    def __init__(self, per_second: float, burst: float):
        self.per_second, self.burst = per_second, burst
        self._left, self._counted_at = burst, time.monotonic()

    def take(self, amount: float = 1.0) -> bool:
        """Whether there was as much; only then it is used."""
        self._count()
        if self._left < amount:
            return False
        self._left -= amount
        return True

    def wait(self, amount: float) -> float:
        """Uses it in any case: seconds until there is as much again."""
        self._count()
        self._left -= amount
        return max(0.0, -self._left / self.per_second)

    def _count(self) -> None:
        now = time.monotonic()
        self._left = min(self.burst, self._left + (now - self._counted_at) * self.per_second)
        self._counted_at = now
