"""What is wrong with JSON from a client or in a file, in words that need no knowledge of this server.

The JSON library, msgspec, says "Invalid enum value 'x' - at `$.session.type`". The errors here say
'session.type must be "realtime", not "x"', and name the field `session.type` as OpenAI's API does.

Called wherever JSON is read as a type: by `serve.protocols.messages`, the routes of the protocols, and
`serve.sessions.access`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.strict_json import dumps

# The errors that reading JSON as a type may raise.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_Read = TypeVar("_Read")
_type_info = cache(inspect.type_info)  # msgspec takes milliseconds for it, and clients may send many wrong messages
_TEXT, _PARAM = 300, 100  # characters of an error's text and of the name of its field
_SHOWN = 50  # characters of a wrong value that the text quotes
_PLACE = re.compile(r" - at (`key` in )?`\$\.?([^`]*)`$")  # where msgspec found the fault
# One step of such a place: the index of an item; "[...]" for a value of an object, whatever its key; or a field.
_STEP = re.compile(r"\[(\d+|\.\.\.)\]|([^.\[\]]+)")


def read_json(data: bytes, kind: type[_Read], root: str = "") -> _Read:
    """Returns JSON as a type.

    Args:
      data: the JSON, in UTF-8.
      kind: the type.
      root: path of this JSON in what the client sends, for the error.

    Raises:
      InvalidMessage: what is wrong.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as error:
        raise explain(error, kind, data, root) from error


def explain(error: Exception, kind: Any, data: bytes, root: str = "") -> InvalidMessage:
    """Returns the error of JSON that cannot be read as a type.

    Args:
      error: one of `UNREADABLE`, from reading `data` as `kind`.
      kind: the type, which may be a union.
      data: the JSON.
      root: path of this JSON in what the client sends.
    """
    if not isinstance(error, msgspec.ValidationError):
        return InvalidMessage("invalid_json", f"this is not valid JSON in UTF-8: {error}"[:_TEXT], root or None)
    text = str(error)
    place = _PLACE.search(text)
    path = place[2] if place else ""
    text = text[: place.start()] if place else text
    param = f"{root}.{path}" if root and path else root or path
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        param = f"{param}.{unknown[1]}" if param else unknown[1]
        return InvalidMessage("unknown_parameter", f"there is no parameter {param}"[:_TEXT], param[:_PARAM])
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return InvalidMessage("missing_required_parameter", f"{param} is missing", param)
    name = param.removesuffix("[...]") or "this JSON"
    if place and place[1]:
        name = f"each key of {name}"
    elif path.endswith("[...]"):
        name = f"each value of {name}"
    wrong = (
        None if isinstance(error.__cause__, ValueError) else _wrong_value(kind, data, path, bool(place and place[1]))
    )
    text = f"{name}: {text}" if wrong is None else f"{name} must be {wrong}"
    return InvalidMessage("invalid_value", text[:_TEXT], param.removesuffix("[...]") or None)


def _wrong_value(kind: Any, data: bytes, path: str, key: bool) -> str | None:
    """Returns which values are allowed at a place, and which value is there; None: this cannot be said.

    Args:
      kind: the type of the JSON.
      data: the JSON.
      path: the place, as msgspec names it.
      key: the fault is a key of the object at this place.
    """
    try:
        value = msgspec.json.decode(data)
    except UNREADABLE:  # for example if the JSON has a number that is too large, such as 1e400
        return None
    options = _options(_type_info(kind))
    for step in _STEP.finditer(path):
        if step[2] is not None:
            options, value = _enter_field(options, value, step[2])
        elif step[1] == "...":
            options, value = _inner(options, inspect.DictType, "value_type"), None
        else:
            index = int(step[1])
            options = _items(options, index)
            value = value[index] if isinstance(value, list) and index < len(value) else None
    if key:
        options, value = _inner(options, inspect.DictType, "key_type"), None
    phrases = list(dict.fromkeys(phrase for option in options for phrase in _phrases(option)))
    if not phrases:
        return None
    allowed = " or ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    in_any = key or path.endswith("[...]")
    return allowed if in_any else allowed + _found(value)


def _options(info: inspect.Type) -> list[inspect.Type]:
    """Returns the types that a value may have: the members of a union, or the one type."""
    if isinstance(info, inspect.Metadata):
        return _options(info.type)
    if isinstance(info, inspect.UnionType):
        return [option for inner in info.types for option in _options(inner)]
    return [info]


def _inner(options: Iterable[inspect.Type], container: type, attribute: str) -> list[inspect.Type]:
    """Returns the types that the content of a container may have, for example the values of an object.

    Args:
      options: the types that the container itself may have. Types that are not of the class `container` are left out.
      container: a class of containers in `msgspec.inspect`.
      attribute: the attribute of this class that holds the type of the content.
    """
    found = [option for option in options if isinstance(option, container)]
    return [inner for option in found for inner in _options(getattr(option, attribute))]


def _items(options: list[inspect.Type], index: int) -> list[inspect.Type]:
    """Returns the types that an item of a list may have."""
    fixed = [option.item_types[index] for option in options if isinstance(option, inspect.TupleType)]
    found = [inner for option in fixed for inner in _options(option)]
    return found + [
        inner for kind in (inspect.ListType, inspect.VarTupleType) for inner in _inner(options, kind, "item_type")
    ]


def _enter_field(options: list[inspect.Type], value: Any, name: str) -> tuple[list[inspect.Type], Any]:
    """Returns the types that a field of an object may have, and the field's value.

    Of several types of objects, the field that tells them apart selects one.
    """
    fields = value if isinstance(value, dict) else {}
    structs = [option for option in options if isinstance(option, inspect.StructType)]
    tags = tuple(struct.tag for struct in structs if struct.tag_field == name)
    if tags:
        return [inspect.LiteralType(tags)], fields.get(name)
    found = []
    for struct in structs:
        if struct.tag_field is None or struct.tag_field not in fields or fields[struct.tag_field] == struct.tag:
            found += [inner for field in struct.fields if field.encode_name == name for inner in _options(field.type)]
    return found, fields.get(name)


def _phrases(option: inspect.Type) -> list[str]:
    """Returns what a value of a type may be, for example `"audio"` and `"text"`, or `an integer from 1 to 4096`."""
    match option:
        case inspect.LiteralType():
            return [dumps(value) for value in option.values]
        case inspect.NoneType():
            return ["null"]
        case inspect.BoolType():
            return ["true", "false"]
        case inspect.IntType() | inspect.FloatType():
            kind = "an integer" if isinstance(option, inspect.IntType) else "a number"
            return [
                kind + _between(option.ge, option.le, "") + (f" above {option.gt}" if option.gt is not None else "")
            ]
        case inspect.StrType():
            pattern = f" that matches {option.pattern}" if option.pattern else ""
            return ["a string" + _between(option.min_length, option.max_length, " characters") + pattern]
        case inspect.CustomType():
            return ["a string"]
        case inspect.ListType():
            return ["a list" + _between(option.min_length, option.max_length, " items")]
        case inspect.TupleType():
            return ["a list" + _between(len(option.item_types), len(option.item_types), " items")]
        case inspect.VarTupleType():
            return ["a list" + _between(option.min_length, option.max_length, " items")]
        case inspect.DictType():
            return ["an object" + _between(option.min_length, option.max_length, " keys")]
        case inspect.StructType():
            return ["an object"]
    return []


def _between(low: float | None, high: float | None, unit: str) -> str:
    """Returns limits as words to follow a noun; empty if there are none."""
    if low is None and high is None:
        return ""
    joined = " of"
    if low == high:
        return f"{joined} {low}{unit.removesuffix('s') if low == 1 else unit}"
    if low is None:
        return f"{joined} at most {high}{unit}"
    return f"{joined} {low}{unit} or more" if high is None else f" from {low} to {high}{unit}"


def _found(value: Any) -> str:
    """Returns the wrong value, as words to end a sentence; empty if the value is long."""
    if isinstance(value, dict):
        return ", not an object"
    if isinstance(value, list):
        return f", not a list of {len(value)}"
    shown = dumps(value)
    return f", not {shown}" if len(shown) <= _SHOWN else ""
