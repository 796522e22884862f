"""Writes the events of one session of the Realtime API. Used by the other modules of this folder."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.transport.replay_buffer import ReplayBuffer


class EventWriter:
    """Writes events into the replay buffer of a session."""

    def __init__(self, frames: ReplayBuffer):
        self.frames = frames

    def send(self, kind: str, **fields: Any) -> None:
        """Writes an event.

        Args:
          kind: type of the event.
          **fields: the other fields, in the order in which they are sent.
        """
        event = {"type": kind, "event_id": f"event_{secrets.token_urlsafe(12)}", **fields}
        event["sequence_number"] = self.frames.last_number + 1
        self.frames.append(msgspec.json.encode(event))

    def send_error(self, invalid: InvalidMessage, kind: str = "invalid_request_error") -> None:
        """Writes an `error`."""
        error = {"type": kind, "code": invalid.code, "message": str(invalid), "param": invalid.param}
        self.send("error", error=error | {"event_id": invalid.event_id})
