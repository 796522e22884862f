"""The token bucket: limits a rate, and allows short bursts. Called by everything that reads from clients."""

from __future__ import annotations

import time


class TokenBucket:
    """A token bucket, which is full at the start.

    The units are the caller's: messages, bytes, seconds of computing time.

    Args:
      per_second: tokens that flow in per second.
      burst: tokens that the bucket holds at most.
    """

    def __init__(self, per_second: float, burst: float):
        self.per_second, self.burst = per_second, burst
        self._tokens, self._refilled_at = burst, time.monotonic()

    def try_take(self, amount: float = 1.0) -> bool:
        """Takes `amount` tokens if the bucket holds that many, else none. Returns whether it took the tokens."""
        self._refill()
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True

    def take(self, amount: float) -> float:
        """Takes `amount` tokens in any case, and returns the seconds until the bucket has no debt."""
        self._refill()
        self._tokens -= amount
        return max(0.0, -self._tokens / self.per_second)

    def _refill(self) -> None:
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._refilled_at) * self.per_second)
        self._refilled_at = now
