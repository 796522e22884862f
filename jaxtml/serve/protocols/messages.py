"""JSON messages of clients, as types: what does not fit them is refused with the name of what is wrong.

A protocol's messages are `Event`s, told apart by `type`; a `MessageTypes` reads one of them. Base64 comes as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec

from jaxtml.serve.sessions.errors import InvalidMessage

_Message = TypeVar("_Message")
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what JSON that is not as its type raises


Name = Annotated[str, msgspec.Meta(max_length=512)]  # what a client calls something


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An object of which every field is known."""


class Event(Strict, tag_field="type", kw_only=True):
    """A message. `event_id` is the client's name for it."""

    event_id: Name | None = None


class _Named(msgspec.Struct):
    type: Any = None
    event_id: Any = None


class MessageTypes(Generic[_Message]):
    """What a client may say at some point.

    Args:
      kinds: a union of `Event`s.
      elsewhere: a union of those that it may say at another point; None: there are none.
      unsupported: types that its protocol has and this server does not.
    """

    def __init__(self, kinds: Any, elsewhere: Any = None, unsupported: Collection[str] = ()):
        self.decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(kinds)
        self.elsewhere = _tags(elsewhere) if elsewhere is not None else ()
        self.known = sorted((*_tags(kinds), *self.elsewhere))
        self.unsupported = unsupported

    def read(self, data: bytes) -> _Message:
        """Raises `InvalidMessage`, with the client's `event_id` where there is one."""
        try:
            return self.decoder.decode(data)
        except UNREADABLE as error:
            raise self._invalid(error, data) from error

    async def taken(self, data: bytes, take: Callable[[_Message], Awaitable[None]]) -> None:
        """Reads a message and has it taken. Raises `InvalidMessage`, with the client's `event_id`, where one of the two
        fails; a `ValueError` of `take` is one of its values."""
        message: Any = self.read(data)
        try:
            await take(message)
        except InvalidMessage as invalid:
            invalid.event_id = message.event_id
            raise
        except ValueError as error:
            raise InvalidMessage("invalid_value", str(error), None, message.event_id) from error

    def _invalid(self, error: Exception, data: bytes) -> InvalidMessage:
        try:
            named = msgspec.json.decode(data, type=_Named)
        except UNREADABLE:
            return InvalidMessage("invalid_json", f"a message is one JSON object, in UTF-8: {error}"[:300])
        event_id = named.event_id if isinstance(named.event_id, str) else None
        if named.type in self.unsupported:
            return InvalidMessage("unsupported_event", f"this server has no use for {named.type}", "type", event_id)
        text = str(error)
        where = re.search(r"`\$\.?([^`]*)`", text)
        param = where[1] if where else None
        if unknown := re.search(r"unknown field `([^`]*)`", text):
            param = f"{param}.{unknown[1]}" if param else unknown[1]
            return InvalidMessage("unknown_parameter", f"there is no parameter {param}"[:300], param[:100], event_id)
        if missing := re.search(r"missing required field `([^`]*)`", text):
            param = f"{param}.{missing[1]}" if param else missing[1]
            return InvalidMessage("missing_required_parameter", f"{param} is missing", param, event_id)
        if param == "type" and named.type in self.elsewhere:
            return InvalidMessage("invalid_event_order", f"{named.type} has no place here", "type", event_id)
        if param == "type":
            return InvalidMessage("invalid_event_type", f"type is one of {', '.join(self.known)}", param, event_id)
        return InvalidMessage("invalid_value", text[:300], param, event_id)


def _tags(kinds: Any) -> tuple[str, ...]:
    return tuple(str(kind.__struct_config__.tag) for kind in get_args(kinds) or (kinds,))
