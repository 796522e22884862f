"""A sideband: a second connection that watches and directs a GPT-Live session beside its client.

A sideband reads the session's events, and both voices as 24 kHz PCM with times. It may send every message that a client
may send, except sound. `routes` opens sidebands; `protocol` feeds them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from jaxtml.serve.protocols.live import events
from jaxtml.serve.transport.replay_buffer import ReplayBuffer
from jaxtml.serve.transport.sound import SoundEncoder, SoundFormat
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES

_FORMAT = SoundFormat("pcm", 24_000)

SendEvent = Callable[[dict[str, Any]], None]


class Sideband:
    """One sideband.

    Args:
      handle: handles a message of this sideband. Its second argument is the function that sends an error back.

    Attributes:
      replay_buffer: frames for the sideband.
    """

    def __init__(self, handle: Callable[[bytes, SendEvent], Awaitable[None]]):
        self.replay_buffer = ReplayBuffer()
        self._handle = handle
        self._input_encoder, self._output_encoder = SoundEncoder(_FORMAT), SoundEncoder(_FORMAT)
        self._input = np.zeros(0, np.float32)  # less than a micro-turn

    def send(self, event: dict[str, Any]) -> None:
        """Writes an event for the sideband."""
        events.append(self.replay_buffer, event)

    def send_input(self, samples: np.ndarray) -> None:
        """Passes on what the client sends, muted or not, in pieces of one micro-turn.

        Args:
          samples: `[N]` float32 at 16 kHz.
        """
        self._input = np.concatenate([self._input, samples])
        while len(self._input) >= MICRO_TURN_SAMPLES:
            piece, self._input = self._input[:MICRO_TURN_SAMPLES], self._input[MICRO_TURN_SAMPLES:]
            self.send({"type": "session.input_audio.append", "audio": self._input_encoder.encode(piece)})

    def send_output(self, wave: np.ndarray, t_ms: int) -> None:
        """Passes on one micro-turn of the model's voice.

        Args:
          wave: `[3200]` float32 at 16 kHz.
          t_ms: time of the session at which the client plays the sound.
        """
        event = {"type": "session.output_audio.delta", "delta": self._output_encoder.encode(wave)}
        self.send(event | {"start_ms": t_ms, "end_ms": t_ms + MICRO_TURN_MS})

    async def receive(self, message: bytes) -> None:
        """Handles one message of the sideband."""
        await self._handle(message, self.send)
