"""The jitter buffer: audio that a session has received and not yet given to the model, cut into micro-turns.

The scheduler (`serve.runtime.scheduler`) takes one micro-turn from it at each tick. Protocols push audio into it.

The rules, which the tests hold:

- A micro-turn takes the oldest 200 ms of audio. If less has arrived, silence fills the rest. A tick waits for nobody.
- Audio that arrives late is not dropped: the model hears it after that silence. The audio that is then left in the
  buffer after each micro-turn is the reserve. Each delay of the network makes the reserve larger, until the reserve is
  as large as the network's jitter.
- A reserve of more than 200 ms that lasts for five seconds is latency. The buffer then removes one micro-turn of
  silence, at most once in five seconds. It never removes speech. This also limits the latency from a fast client clock.
- A reserve of more than two seconds is taken for an upload, for example of a file, because a client that sends in real
  time makes no such reserve. Audio that arrived late does not count: it adds to the reserve because the model has
  already heard silence in its place. The model hears an upload at 200 ms per tick, and hears it whole: the buffer
  removes silence only if no upload was in it for the last five seconds.
- At ten seconds the buffer is full. The code that reads the network then stops reading until there is space.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

CAPACITY = 10 * SAMPLE_RATE  # samples
_UPLOAD = 2 * SAMPLE_RATE  # samples; a larger reserve was not sent in real time
_PATIENCE = 25  # micro-turns (5 s) for which a reserve must last before the buffer removes silence
_SILENT_RMS = 10 ** (-50 / 20)  # root mean square relative to full scale, -50 dBFS


class JitterBuffer:
    """The jitter buffer of one session. Not thread-safe.

    Attributes:
      waiting_samples: samples at 16 kHz in the buffer.
      missed_samples: samples of silence that stood in for audio that had not arrived.
      cut_samples: samples of silence that were removed from the buffer.
      muted: audio that arrives while this is true is dropped.
    """

    def __init__(self) -> None:
        self.stream = DmelStream()
        self.chunks: deque[np.ndarray] = deque()
        self.waiting_samples = self.missed_samples = self.cut_samples = 0
        self.muted = False
        # The smallest and the largest reserve since the last decision about latency, and the micro-turns since then.
        self._smallest_reserve, self._largest_reserve, self._micro_turns = CAPACITY, 0, 0

    def free_samples(self) -> int:
        """Returns the number of samples that still fit."""
        return max(0, CAPACITY - self.waiting_samples)

    def push(self, samples: np.ndarray) -> None:
        """Adds audio.

        Args:
          samples: `[N]` float32 at 16 kHz, finite.

        Raises:
          ValueError: not all of the samples fit.
        """
        if len(samples) > self.free_samples():
            raise ValueError(f"{len(samples)} samples do not fit: the jitter buffer has room for {self.free_samples()}")
        if not self.muted and len(samples):
            self.chunks.append(samples)
            self.waiting_samples += len(samples)

    def clear(self) -> None:
        """Drops all waiting audio."""
        self.chunks.clear()
        self.waiting_samples = 0

    def pop_frames(self) -> np.ndarray:
        """Removes one micro-turn of audio and returns its dMel frames, `[4, 80]` uint8."""
        self._reduce_latency()
        samples = self._pop_samples(MICRO_TURN_SAMPLES)
        self.missed_samples += MICRO_TURN_SAMPLES - len(samples)
        self.stream, bins = self.stream.step(np.pad(samples, (0, MICRO_TURN_SAMPLES - len(samples))))
        return bins

    def _reduce_latency(self) -> None:
        """Removes one micro-turn of silence if a reserve has lasted for `_PATIENCE` micro-turns."""
        reserve = self.waiting_samples - MICRO_TURN_SAMPLES
        self._smallest_reserve = min(self._smallest_reserve, reserve)
        self._largest_reserve = max(self._largest_reserve, reserve)
        self._micro_turns += 1
        if self._micro_turns < _PATIENCE:
            return
        # Audio that a stalled network delivers at once is no upload: it makes up for audio that was missed before.
        late_samples = max(0, self.missed_samples - self.cut_samples)
        if self._smallest_reserve > MICRO_TURN_SAMPLES and self._largest_reserve <= _UPLOAD + late_samples:
            oldest = self._pop_samples(MICRO_TURN_SAMPLES)
            if np.sqrt(np.mean(np.square(oldest))) >= _SILENT_RMS:  # someone is speaking: try again next micro-turn
                self.chunks.appendleft(oldest)
                self.waiting_samples += len(oldest)
                return
            self.cut_samples += len(oldest)
        self._smallest_reserve, self._largest_reserve, self._micro_turns = CAPACITY, 0, 0

    def _pop_samples(self, count: int) -> np.ndarray:
        """Removes the oldest samples, at most `count`, and returns them as `[N]` float32."""
        chunks: list[np.ndarray] = []
        remaining = min(count, self.waiting_samples)
        self.waiting_samples -= remaining
        while remaining:
            chunk = self.chunks.popleft()
            if len(chunk) > remaining:
                self.chunks.appendleft(chunk[remaining:])
                chunk = chunk[:remaining]
            chunks.append(chunk)
            remaining -= len(chunk)
        return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
