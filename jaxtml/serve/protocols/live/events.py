"""GPT-Live's events as dictionaries, and its format of errors. Used by the other modules of this folder."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.transport.replay_buffer import ReplayBuffer


def new_event(kind: str, client_event_id: str | None = None, **fields: Any) -> dict[str, Any]:
    """Returns an event with an id of its own.

    Args:
      kind: type of the event.
      client_event_id: id of the client's message that caused the event; None: no message did, or it had no id.
      **fields: the other fields, in the order in which they are sent.
    """
    event = {"type": kind, "event_id": f"evt_{secrets.token_urlsafe(12)}", **fields}
    return event if client_event_id is None else event | {"client_event_id": client_event_id}


def append(frames: ReplayBuffer, event: dict[str, Any]) -> None:
    """Writes an event with its `sequence_number` into a replay buffer."""
    frames.append(msgspec.json.encode(event | {"sequence_number": frames.last_number + 1}))


def error_fields(invalid: InvalidMessage, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Returns the field `error` of an `error` event."""
    error: dict[str, Any] = {"type": kind, "code": invalid.code, "message": str(invalid)}
    if invalid.param is not None:
        error["param"] = invalid.param
    if invalid.event_id is not None:
        error["client_event_id"] = invalid.event_id
    return error
