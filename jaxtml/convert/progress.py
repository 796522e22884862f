"""The progress of a long copy in the log. Called by the conversion, the verification and `jaxtml info --verify`."""

from __future__ import annotations

import threading
import time

from absl import logging

REPORT_S = 5.0  # seconds between two lines


class CopyProgress:
    """Writes a line to the log every few seconds: bytes, rate and time left.

    Args:
      total: the number of bytes.
      done: the number of bytes that an interrupted conversion has already copied. They do not count for the rate.
      prefix: the beginning of each line.
    """

    def __init__(self, total: int, done: int, prefix: str = ""):
        self.total, self.done, self.done_before, self.prefix = total, done, done, prefix
        self.started_s = self.reported_s = time.monotonic()
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Counts bytes that are done. Several threads may call it at the same time."""
        with self.lock:
            self.done += nbytes
            now_s = time.monotonic()
            if now_s - self.reported_s < REPORT_S and self.done < self.total:
                return
            self.reported_s = now_s
            rate = (self.done - self.done_before) / max(now_s - self.started_s, 1e-9)
            minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
            unit, name = byte_unit(self.total)
            logging.info(
                "%s%.1f of %.1f %s  %.2f %s/s  %d:%02d left",
                self.prefix, self.done / unit, self.total / unit, name, rate / unit, name, minutes, seconds,
            )  # fmt: skip


def byte_unit(nbytes: int) -> tuple[float, str]:
    """Returns the unit in which a number of bytes is shown, and its name."""
    return (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
