"""What a session has sent and not been given yet: sound cut to micro-turns, whatever the network does to its timing.

The rule, at each tick edge. A micro-turn takes the oldest 200 ms that have arrived. Where there is less, it takes that,
and silence for the rest: the session waits for nobody. Sound that comes late is heard late, after that silence, so a
reserve grows as large as the jitter that there was. A reserve of more than 200 ms that stays for five seconds is
latency: it is taken back from silence, never from speech, a micro-turn in five seconds, which also bounds what a
client's fast clock piles up. More than two seconds beyond what was missed before were not sent in real time: they are
heard in their own time and whole. At ten seconds `room` is zero, and whoever reads the network stops until there is
some.

Called by `serve.runtime.scheduler`.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

CAPACITY = 10 * SAMPLE_RATE  # samples that wait
_UPLOAD = 2 * SAMPLE_RATE
_PATIENCE = 25  # micro-turns that a reserve must stay
_SILENT = 10 ** (-50 / 20)  # root mean square, of full scale


class JitterBuffer:
    """One session's sound on its way in; one thread calls.

    Attributes:
      waiting: samples at 16 kHz that wait.
      missed: samples of silence that stand where nothing had arrived.
      cut: samples of silence that were taken out.
      muted: what arrives now is not heard.
    """

    def __init__(self) -> None:
        self.stream = DmelStream()
        self.parts: deque[np.ndarray] = deque()
        self.waiting_samples = self.missed_samples = self.cut_samples = 0
        self.muted = False
        self._least, self._turns = CAPACITY, 0  # the smallest reserve of the last micro-turns, and how many those are

    def free_samples(self) -> int:
        """Samples that may still be put."""
        return max(0, CAPACITY - self.waiting_samples)

    def push(self, samples: np.ndarray) -> None:
        """`[N]` float32 at 16 kHz, finite. Raises `ValueError` where there is no room for all of them."""
        if len(samples) > self.free_samples():
            raise ValueError(f"{len(samples)} samples, and room for {self.free_samples()}")
        if not self.muted and len(samples):
            self.parts.append(samples)
            self.waiting_samples += len(samples)

    def clear(self) -> None:
        """What waits is never heard."""
        self.parts.clear()
        self.waiting_samples = 0

    def pop_frames(self) -> np.ndarray:
        """One micro-turn: `[4, 80]` uint8 dMel frames."""
        self._take_back()
        found = self._oldest(MICRO_TURN_SAMPLES)
        self.missed_samples += MICRO_TURN_SAMPLES - len(found)
        self.stream, bins = self.stream.step(np.pad(found, (0, MICRO_TURN_SAMPLES - len(found))))
        return bins

    def _take_back(self) -> None:
        """Cuts a micro-turn of silence where a reserve has stayed."""
        self._least, self._turns = min(self._least, self.waiting_samples - MICRO_TURN_SAMPLES), self._turns + 1
        if self._turns < _PATIENCE:
            return
        # As much as was missed before is no upload: the network had stalled.
        if MICRO_TURN_SAMPLES < self._least <= _UPLOAD + max(0, self.missed_samples - self.cut_samples):
            oldest = self._oldest(MICRO_TURN_SAMPLES)
            if np.sqrt(np.mean(np.square(oldest))) >= _SILENT:  # not yet: someone is speaking
                self.parts.appendleft(oldest)
                self.waiting_samples += len(oldest)
                return
            self.cut_samples += len(oldest)
        self._least, self._turns = CAPACITY, 0

    def _oldest(self, count: int) -> np.ndarray:
        """At most so many samples, taken out."""
        found: list[np.ndarray] = []
        left = min(count, self.waiting_samples)
        self.waiting_samples -= left
        while left:
            part = self.parts.popleft()
            if len(part) > left:
                self.parts.appendleft(part[left:])
                part = part[:left]
            found.append(part)
            left -= len(part)
        return np.concatenate(found) if found else np.zeros(0, np.float32)
