"""JSON messages of clients as types. A message that fits no type is refused with an error that says what is wrong.

A protocol declares each message of its clients as a subclass of `Event`. The field `type` tells them apart. A
`MessageTypes` reads the messages that a client may send at one point of a session. Fields of type `bytes` are base64 in
JSON. Used by the protocols whose messages are JSON.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec

from jaxtml.serve.sessions.errors import InvalidMessage

_Message = TypeVar("_Message")
# The errors that reading JSON as a type may raise.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

# An id or a name that a client chooses.
Name = Annotated[str, msgspec.Meta(max_length=512)]


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A JSON object that may have no unknown fields."""


class Event(Strict, tag_field="type", kw_only=True):
    """One message of a client. `event_id` is the client's own id of the message."""

    event_id: Name | None = None


class _Header(msgspec.Struct):
    """The two fields that an error about a message needs; everything else in the message is ignored."""

    type: Any = None
    event_id: Any = None


class MessageTypes(Generic[_Message]):
    """The messages that a client may send at one point of a session.

    Args:
      accepted: union of the `Event` types that are accepted here.
      elsewhere: union of the `Event` types that are accepted at another point only; None: there are none.
      unsupported: names of messages that the protocol has and this server does not.
    """

    def __init__(self, accepted: Any, elsewhere: Any = None, unsupported: Collection[str] = ()):
        self.decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(accepted)
        self.elsewhere = _type_names(elsewhere) if elsewhere is not None else ()
        self.known = sorted((*_type_names(accepted), *self.elsewhere))
        self.unsupported = unsupported

    def read(self, data: bytes) -> _Message:
        """Returns the message in `data`.

        Raises:
          InvalidMessage: what is wrong, with the client's `event_id` if the message has one.
        """
        try:
            return self.decoder.decode(data)
        except UNREADABLE as error:
            raise self._invalid(error, data) from error

    async def handle(self, data: bytes, handler: Callable[[_Message], Awaitable[None]]) -> None:
        """Reads the message in `data` and passes it to `handler`.

        Raises:
          InvalidMessage: the message cannot be read, or `handler` raised `InvalidMessage` or `ValueError` because of
            it. The error has the client's `event_id` if the message has one.
        """
        message: Any = self.read(data)
        try:
            await handler(message)
        except InvalidMessage as invalid:
            invalid.event_id = message.event_id
            raise
        except ValueError as error:
            raise InvalidMessage("invalid_value", str(error), None, message.event_id) from error

    def _invalid(self, error: Exception, data: bytes) -> InvalidMessage:
        """Returns the error for a message that could not be read as one of the accepted types."""
        try:
            header = msgspec.json.decode(data, type=_Header)
        except UNREADABLE:
            return InvalidMessage("invalid_json", f"a message is one JSON object, in UTF-8: {error}"[:300])
        event_id = header.event_id if isinstance(header.event_id, str) else None
        if header.type in self.unsupported:
            return InvalidMessage("unsupported_event", f"this server does not support {header.type}", "type", event_id)
        text = str(error)
        where = re.search(r"`\$\.?([^`]*)`", text)
        param = where[1] if where else None
        if unknown := re.search(r"unknown field `([^`]*)`", text):
            param = f"{param}.{unknown[1]}" if param else unknown[1]
            return InvalidMessage("unknown_parameter", f"there is no parameter {param}"[:300], param[:100], event_id)
        if missing := re.search(r"missing required field `([^`]*)`", text):
            param = f"{param}.{missing[1]}" if param else missing[1]
            return InvalidMessage("missing_required_parameter", f"{param} is missing", param, event_id)
        if param == "type" and header.type in self.elsewhere:
            return InvalidMessage(
                "invalid_event_order", f"{header.type} is not accepted at this point", "type", event_id
            )
        if param == "type":
            return InvalidMessage("invalid_event_type", f"type must be one of {', '.join(self.known)}", param, event_id)
        return InvalidMessage("invalid_value", text[:300], param, event_id)


def _type_names(events: Any) -> tuple[str, ...]:
    """Returns the value of the field `type` of each `Event` type in a union, or of one `Event` type."""
    return tuple(str(event.__struct_config__.tag) for event in get_args(events) or (events,))
