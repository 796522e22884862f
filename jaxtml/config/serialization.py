"""Configs as JSON: the `config.json` beside every checkpoint, and JSON values converted to the types of the fields.

`to_json` and `from_json` are each other's inverse. `from_json` checks names and types; `jaxtml.config.tree.validate`
checks ranges. `typed` is also how `--set` converts its values.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from typing import Any

from jaxtml.config.rules import LARGEST_INT
from jaxtml.config.tree import Config
from jaxtml.errors import InputError

_ADVICE = {int: ": give a whole number", float: ": give a number", bool: ": give true or false", str: ": give a text"}

_NOT_FINITE = re.compile(r"[+-]?(nan|inf(inity)?)", re.IGNORECASE)  # as Python and shells write such numbers

# Fields that were added after checkpoints had been written. `to_json` leaves out those that have their default. So an
# older config keeps its JSON to the byte, and earlier revisions can read the JSON of a new config. A digest of
# this JSON identifies a conversion with `--as`: if the JSON stays the same, a later revision can resume the conversion.
_LEFT_OUT_AT_DEFAULT = (
    ("serve.background_text", False),
    ("data.longest_silence", None),
    ("backbone.sliding.retained", 0),
    ("backbone.global_.retained", 0),
)


def to_json(config: Config) -> str:
    """Returns the config as indented JSON that ends with a newline. A config that was checked has no NaN."""
    value = dataclasses.asdict(config)
    for path, default in _LEFT_OUT_AT_DEFAULT:
        *sections, name = path.split(".")
        owner = functools.reduce(dict.__getitem__, sections, value)
        if owner[name] == default:
            del owner[name]
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Config:
    """Returns the config that `to_json` wrote as `text`.

    Raises:
      InputError: `text` is not JSON or not an object, or a field is unknown, missing or of another type.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"config is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError("config is not a JSON object")
    train = value.get("train")
    if isinstance(train, dict) and isinstance(train.get("remat"), bool):  # as in files from before 2026-11-24
        train["remat"] = "full" if train["remat"] else "none"
    return typed(Config, value, "config")


def typed(hint: Any, value: Any, path: str) -> Any:
    """Converts a JSON value to the type of a field.

    Args:
      hint: the type, as `typing.get_type_hints` gives it (without rules).
      value: the result of `json.loads`.
      path: the field's path, for messages.

    Raises:
      InputError: `value` does not have that type. The message names the field.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return typed(next(option for option in options if option is not type(None)), value, path)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _dataclass(hint, value, path)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(typed(kind, item, path) for kind, item in zip(kinds, value, strict=True))
    if hint is float and (type(value) is float or (type(value) is int and abs(value) <= LARGEST_INT)):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:  # `type`: True is an int to `isinstance`
        return value
    advice = _ADVICE.get(hint, "")
    if hint in (int, float) and isinstance(value, str) and _NOT_FINITE.fullmatch(value):
        raise InputError(f"config field {path}: {value!r} is not a finite number{advice}")
    raise InputError(f"config field {path}: {value!r:.60} is not {getattr(hint, '__name__', hint)}{advice}")


def _dataclass(hint: Any, value: dict[str, Any], path: str) -> Any:
    """Builds the dataclass `hint` from a JSON object."""
    hints = typing.get_type_hints(hint)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise InputError(f"config field {path}.{unknown[0]} is unknown; there are {', '.join(hints)}")
    fields = {name: typed(hints[name], item, f"{path}.{name}") for name, item in value.items()}
    try:
        return hint(**fields)
    except TypeError as error:  # a field without a default is missing
        raise InputError(f"config field {path}: {error}") from error
