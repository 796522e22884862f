"""One section of Inkling's `config.json`, whose fields are read by type. Called by `checkpoint.inkling.config`.

A released config may hold anything. A method that reads a field raises `InputError` with the field's name if the field
is missing or has a value of another kind. A field that is null counts as missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from jaxtml.errors import InputError

_LONGEST_VALUE = 60  # characters of a value that a message repeats

_AGAIN = "take the config.json that belongs to these weights"


class ConfigSection:
    """One section of `config.json`, for example `text_config`.

    Raises:
      InputError: the section is missing.
    """

    def __init__(self, released: Mapping[str, Any], name: str):
        fields = released.get(name)
        if not isinstance(fields, dict):
            raise InputError(
                f"config.json has no {name}: give a multimodal Inkling checkpoint, which has text, audio and vision"
            )
        self.name, self.fields = name, fields
        self.read: set[str] = set()

    def value(self, *names: str, default: Any = None) -> Any:
        """Returns the first of these fields that is there. Several names are several spellings of one field."""
        self.read.update(names)
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), default)

    def integer(self, *names: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """Returns an integer from 0 to `most`."""
        value = self.value(*names, default=default)
        if value is None:
            raise InputError(f"config.json has no {names[0]} in its {self.name}: {_AGAIN}")
        if type(value) is not int or not 0 <= value <= most:
            raise InputError(
                f"config.json: {names[0]} is {short_repr(value)}, not an integer from 0 to {most}: {_AGAIN}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a finite number."""
        value = self.value(name, default=default)
        if value is None:
            raise InputError(f"config.json has no {name} in its {self.name}: {_AGAIN}")
        if type(value) not in (int, float) or not abs(value) < 2**63:
            raise InputError(f"config.json: {name} is {short_repr(value)}, not a number: {_AGAIN}")
        return float(value)

    def indices(self, name: str, size: int) -> list[int] | None:
        """Returns a list of indices below `size`, or None if the field is missing."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < size for i in value):
            raise InputError(
                f"config.json: {name} is {short_repr(value)}, not a list of integers below {size}: {_AGAIN}"
            )
        return value

    def layer_kinds(self, name: str, kinds: tuple[str, str], layers: int) -> list[str] | None:
        """Returns a list with one of the two `kinds` for each layer, or None if the field is missing."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(kind not in kinds for kind in value):
            raise InputError(
                f"config.json: {name} is {short_repr(value)}, not a list of {' or '.join(kinds)} for {layers} "
                f"layers: {_AGAIN}"
            )
        return value

    def require(self, values: Mapping[str, Any]) -> None:
        """Raises `InputError` if one of these fields is there and has another value."""
        for name, value in values.items():
            if self.value(name, default=value) != value:
                found = short_repr(self.fields[name])
                raise InputError(f"config.json: {name} is {found}; jaxtml supports {value!r} alone")

    def warn_unread(self, unused: Collection[str]) -> None:
        """Writes a warning to the log with the names of fields that nothing has read, except for those in `unused`."""
        unread = {name for name, value in self.fields.items() if value not in (None, False, 0, "", [], {})}
        names = ", ".join(sorted(unread - self.read - set(unused)))
        if names:
            logging.warning("config.json: fields of %s that jaxtml does not know and ignores: %s", self.name, names)


def short_repr(value: Any) -> str:
    """Returns `repr(value)`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
