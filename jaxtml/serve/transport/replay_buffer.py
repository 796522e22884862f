"""The replay buffer: the numbered frames that the server sends to a client, kept for a while.

Protocols append frames, and connections (`serve.transport.connection`) send them. A client that was cut off and comes
back gets the frames that it missed.

The rule: a replay buffer keeps a fixed number of bytes, about half a minute of audio and text, whether the frames have
been sent or not. It never waits for a reader. A reader that has fallen behind the kept frames has lost some, and gets
`ReplayLost`. Several readers may read at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque

_MAX_BYTES = 3 * 2**20  # 30 s of 24 kHz PCM in base64 are 1.9 MB


class ReplayLost(Exception):
    """A reader asks for frames that are no longer kept."""


class ReplayBuffer:
    """The frames of one client, as its protocol encodes them.

    Args:
      max_bytes: bytes to keep. The newest frame is kept whatever its size.

    Attributes:
      frames: the kept frames, oldest first.
      last_number: number of the newest frame. Frames count from 1; 0 means that there was none.
      kept_bytes: size of the kept frames.
      closed: no more frames will come.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES):
        self.frames: deque[bytes] = deque()
        self.max_bytes, self.kept_bytes, self.last_number, self.closed = max_bytes, 0, 0, False
        self._changed = asyncio.Event()

    def append(self, frame: bytes) -> None:
        """Adds a frame, and drops the oldest frames as long as all frames together have more than `max_bytes`."""
        self.frames.append(frame)
        self.last_number += 1
        self.kept_bytes += len(frame)
        while self.kept_bytes > self.max_bytes and len(self.frames) > 1:
            self.kept_bytes -= len(self.frames.popleft())
        self._wake_readers()

    def close(self) -> None:
        """Marks the end of the frames."""
        self.closed = True
        self._wake_readers()

    async def wait_closed(self) -> None:
        """Waits until the buffer is closed."""
        while not self.closed:
            await self._changed.wait()

    async def frames_after(self, number: int) -> list[bytes]:
        """Waits for frames after frame `number` and returns them.

        Returns an empty list if the buffer is closed and has no more frames.

        Raises:
          ReplayLost: some of these frames are no longer kept.
        """
        while number >= self.last_number and not self.closed:
            await self._changed.wait()
        count = max(0, self.last_number - number)
        if count > len(self.frames):
            oldest = self.last_number - len(self.frames) + 1
            raise ReplayLost(f"frame {number + 1} is no longer kept; the oldest is {oldest}")
        return [self.frames[index] for index in range(len(self.frames) - count, len(self.frames))]

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
