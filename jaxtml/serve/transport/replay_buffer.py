"""What a client is sent, numbered from 1 on, and kept for a while: who was cut off is sent the rest when it is back.

The rule. An outbox keeps so many bytes, half a minute of sound and text, whether they have been sent or not. It never
waits for a reader; one that has fallen behind what is kept has lost something, and is told so (`ReplayLost`). Several
may read. Called by the protocols."""

from __future__ import annotations

import asyncio
from collections import deque

_MOST = 3 * 2**20  # bytes: 30 s of 24 kHz PCM in base64 are 1.9 MB


class ReplayLost(Exception):
    """A reader asks for frames that are no longer kept."""


class ReplayBuffer:
    """Frames of one client, as its protocol writes them.

    Attributes:
      last: the number of the newest; 0 where there was none.
      closed: nothing more will come.
    """

    def __init__(self, max_bytes: int = _MOST):
        self.frames: deque[bytes] = deque()
        self.max_bytes, self.kept_bytes, self.last_number, self.closed = max_bytes, 0, 0, False
        self._changed = asyncio.Event()

    def append(self, frame: bytes) -> None:
        """Adds a frame; the oldest go where there are too many bytes. The newest is always kept."""
        self.frames.append(frame)
        self.last_number += 1
        self.kept_bytes += len(frame)
        while self.kept_bytes > self.max_bytes and len(self.frames) > 1:
            self.kept_bytes -= len(self.frames.popleft())
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    async def wait_closed(self) -> None:
        """Returns when the outbox was closed."""
        while not self.closed:
            await self._changed.wait()

    async def frames_after(self, number: int) -> list[bytes]:
        """The frames behind `number`, as soon as there are any; none where the outbox was closed and has no more.

        Raises:
          Behind: some of them are no longer kept.
        """
        while number >= self.last_number and not self.closed:
            await self._changed.wait()
        count = max(0, self.last_number - number)
        if count > len(self.frames):
            raise ReplayLost(
                f"frame {number + 1} is no longer kept; the oldest is {self.last_number - len(self.frames) + 1}"
            )
        return [self.frames[at] for at in range(len(self.frames) - count, len(self.frames))]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
