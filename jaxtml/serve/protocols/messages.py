"""JSON messages of clients as types. A message that fits no type is refused with an error that says what is wrong.

A protocol declares each message of its clients as a subclass of `Event`. The field `type` tells them apart. A
`MessageTypes` reads the messages that a client may send at one point of a session. Used by the protocols whose messages
are JSON.

Every field has an effect, or is refused with an error, or is declared with `no_effect`. `fields_without_effect` returns
the fields without effect that a client has set, and the protocols name these to the client.
`tests/serve/protocols/test_fields.py` has the list of all fields.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import cache
from typing import Annotated, Any, Generic, TypeVar, get_args
from urllib.parse import unquote_to_bytes

import msgspec

from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.json_errors import UNREADABLE, explain

_Message = TypeVar("_Message")
# The most values of one message, counted by its commas. Commas inside texts count too. A megabyte of `[],[],[]` takes
# 100 ms to read, and becomes 35 MB of objects. No message that this server can use has so many commas: even its longest
# texts have only some hundred kilobytes.
_MAX_VALUES = 2**16

# An id or a name that a client chooses.
Name = Annotated[str, msgspec.Meta(max_length=512)]


class Binary(bytes):
    """Bytes that are base64 in JSON. Padding may be missing, lines may be wrapped, and the alphabet may be url-safe."""


class PictureFile(bytes):
    """The bytes of a picture, in JSON as a `data:` URL (RFC 2397) or as the base64 of `Binary`."""


def decode_base64(text: str) -> bytes:
    """Returns the bytes that `text` encodes in base64, as `Binary` describes it.

    Raises:
      ValueError: `text` is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)  # the usual form, which is by far the fastest to read
    except ValueError:
        pass
    try:
        data = text.encode("ascii").translate(_STANDARD_ALPHABET, delete=b" \t\r\n")
        digits = data.rstrip(b"=")
        padding = len(data) - len(digits)
        if padding and len(data) % 4 or padding > 2:
            raise ValueError("its padding is wrong")
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError) as error:
        raise ValueError(f"this is not base64: {error}"[:200]) from error


_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


def decode_data_url(url: str) -> bytes:
    """Returns the bytes of the picture that a `data:` URL (RFC 2397) holds in base64.

    Raises:
      ValueError: it is another URL, its content is no picture, or it is not in base64.
    """
    head, comma, content = url.strip().partition(",")
    kind, *attributes = head[len("data:") :].split(";")
    if head[:5].lower() != "data:" or not comma or not kind.strip().lower().startswith("image/"):
        raise ValueError("a picture must be a data: URL with the type image/jpeg or image/png; nothing is downloaded")
    if not any(attribute.strip().lower() == "base64" for attribute in attributes):
        raise ValueError("the picture in a data: URL must be in base64")
    return decode_base64(unquote_to_bytes(content).decode("ascii", "replace") if "%" in content else content)


def _decode_field(kind: type, value: Any) -> Any:
    """Reads the types of fields that msgspec does not know; the signature is that of its `dec_hook`."""
    if kind not in (Binary, PictureFile):
        raise NotImplementedError(f"no field has the type {kind}")
    if not isinstance(value, str):
        raise ValueError("base64 is a string")
    is_url = kind is PictureFile and value[:5].lower() == "data:"
    return kind(decode_data_url(value) if is_url else decode_base64(value))


def no_effect(reason: str) -> msgspec.Meta:
    """Declares in a field's `Annotated` type that the field is accepted, and has no effect because of `reason`."""
    return msgspec.Meta(extra={"no_effect": reason})


def fields_without_effect(value: Any, path: str = "") -> dict[str, str]:
    """Returns the fields that a client has set although they have no effect.

    Args:
      value: an object from a client's message, or a list of objects.
      path: path of `value`, for the keys of the result.

    Returns:
      For each such field its path, and why it has no effect.
    """
    if isinstance(value, list | tuple):
        found: dict[str, str] = {}
        for index, item in enumerate(value):
            found |= fields_without_effect(item, f"{path}[{index}]")
        return found
    if not isinstance(value, msgspec.Struct):
        return {}
    found = {}
    for name, reason in declared_fields(type(value)).items():
        content = getattr(value, name)
        if content is None or content is msgspec.UNSET:
            continue
        where = f"{path}.{name}" if path else name
        found |= fields_without_effect(content, where) if reason is None else {where: reason}
    return found


@cache
def declared_fields(kind: type[msgspec.Struct]) -> Mapping[str, str | None]:
    """Returns the names of a type's fields, and why a field has no effect; None: the field has an effect."""
    reasons: dict[str, str | None] = {}
    for field in msgspec.structs.fields(kind):
        info = msgspec.inspect.type_info(field.type)
        extra = (isinstance(info, msgspec.inspect.Metadata) and info.extra) or {}
        reasons[field.name] = extra.get("no_effect")
    return reasons


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A JSON object that may have no unknown fields."""


class Event(Strict, tag_field="type", kw_only=True):
    """One message of a client. `event_id` is the client's own id of the message."""

    event_id: Name | None = None


class _Header(msgspec.Struct):
    """The two fields that an error about a message needs, as raw JSON. All other fields are skipped."""

    type: msgspec.Raw = msgspec.Raw(b"null")
    event_id: msgspec.Raw = msgspec.Raw(b"null")


class MessageTypes(Generic[_Message]):
    """The messages that a client may send at one point of a session.

    Args:
      accepted: union of the `Event` types that are accepted here.
      elsewhere: union of the `Event` types that are accepted at another point only; None: there are none.
      unsupported: names of messages that the protocol has and this server does not.
    """

    def __init__(self, accepted: Any, elsewhere: Any = None, unsupported: Collection[str] = ()):
        self.accepted = accepted
        self.decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(accepted, dec_hook=_decode_field)
        self.elsewhere = _type_names(elsewhere) if elsewhere is not None else ()
        self.known = sorted((*_type_names(accepted), *self.elsewhere))
        self.unsupported = unsupported

    def read(self, data: bytes) -> _Message:
        """Returns the message in `data`.

        Raises:
          InvalidMessage: what is wrong, with the client's `event_id` if the message has one.
        """
        if data.count(b",") > _MAX_VALUES:
            text = f"a message has at most {_MAX_VALUES} values"
            raise self._invalid(InvalidMessage("invalid_value", text), data)
        try:
            return self.decoder.decode(data)
        except UNREADABLE as error:
            raise self._invalid(explain(error, self.accepted, data), data) from error

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

    def _invalid(self, invalid: InvalidMessage, data: bytes) -> InvalidMessage:
        """Returns the error for a message that could not be read as one of the accepted types.

        Args:
          invalid: what is wrong with the message as JSON of these types.
          data: the message.
        """
        try:
            header = msgspec.json.decode(data, type=_Header)
        except msgspec.ValidationError:
            return InvalidMessage("invalid_json", "a message is one JSON object, in UTF-8")
        except UNREADABLE as error:
            return InvalidMessage("invalid_json", f"a message is one JSON object, in UTF-8: {error}"[:300])
        kind, event_id = _text_in(header.type), _text_in(header.event_id)
        if kind in self.unsupported:
            return InvalidMessage("unsupported_event", f"this server does not support {kind}", "type", event_id)
        if invalid.param == "type" and kind in self.elsewhere:
            return InvalidMessage("invalid_event_order", f"{kind} is not accepted at this point", "type", event_id)
        if invalid.param == "type" and invalid.code == "invalid_value":
            text = f"type must be one of {', '.join(self.known)}"
            return InvalidMessage("invalid_event_type", text, "type", event_id)
        invalid.event_id = event_id
        return invalid


def _text_in(field: msgspec.Raw) -> str | None:
    """Returns a field of a header; None: the field is no text."""
    try:
        return msgspec.json.decode(field, type=str)
    except UNREADABLE:
        return None


def _type_names(events: Any) -> tuple[str, ...]:
    """Returns the value of the field `type` of each `Event` type in a union, or of one `Event` type."""
    return tuple(str(event.__struct_config__.tag) for event in get_args(events) or (events,))
