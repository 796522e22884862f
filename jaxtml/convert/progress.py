"""Progress of a conversion."""

from __future__ import annotations

import threading
import time

from absl import logging

REPORT_S = 5.0  # seconds between lines of progress


class CopyProgress:
    """A line every few seconds: bytes, rate, time left."""

    def __init__(self, total: int, done: int, what: str = ""):
        self.total, self.done, self.before, self.what = total, done, done, what
        self.began = self.told = time.monotonic()
        self.lock = threading.Lock()

    def add(self, size: int) -> None:
        with self.lock:
            self.done += size
            now = time.monotonic()
            if now - self.told < REPORT_S and self.done < self.total:
                return
            self.told = now
            rate = (self.done - self.before) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / rate
            unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
            logging.info(
                "%s%.1f of %.1f %s  %.2f %s/s  %d:%02d left",
                self.what, self.done / unit, self.total / unit, name, rate / unit, name, *divmod(round(left), 60),
            )  # fmt: skip
