"""One object of config.json."""

from __future__ import annotations

from typing import Any

from absl import logging

from jaxtml.errors import InputError


class ConfigSection:
    """One object of `config.json`, its fields read by type: a field that is null counts as one that is not there."""

    def __init__(self, released: dict[str, Any], key: str):
        fields = released.get(key)
        if not isinstance(fields, dict):
            raise InputError(f"config.json has no {key}: this is no multimodal Inkling checkpoint")
        self.key, self.fields = key, fields
        self.read: set[str] = set()

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first field that is there: one field, several spellings."""
        self.read.update(names)
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), default)

    def whole(self, *names: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A number that counts something."""
        value = self.get(*names, default=default)
        if value is None:
            raise InputError(f"config.json has no {names[0]}")
        if type(value) is not int or not 0 <= value <= most:
            raise InputError(f"config.json: {names[0]} is {short(value)}, not a number from 0 to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default=default)
        if value is None:
            raise InputError(f"config.json has no {name}")
        if type(value) not in (int, float) or not abs(value) < 2**63:
            raise InputError(f"config.json: {name} is {short(value)}, not a number")
        return float(value)

    def indices(self, name: str, among: int) -> list[int] | None:
        """Some of the numbers below `among`."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < among for i in value):
            raise InputError(f"config.json: {name} is {short(value)}, not a list of numbers below {among}")
        return value

    def kinds(self, name: str, known: tuple[str, str], layers: int) -> list[str] | None:
        """One of two words for each layer."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(kind not in known for kind in value):
            raise InputError(f"config.json: {name} is {short(value)}, not {' or '.join(known)} for {layers} layers")
        return value

    def fixed(self, values: dict[str, Any]) -> None:
        """Raises where a field that is there has another value."""
        for name, value in values.items():
            if self.get(name, default=value) != value:
                found = short(self.fields[name])
                raise InputError(f"config.json: {name} is {found}; this backbone has {value!r} alone")

    def tell_unread(self, idle: tuple[str, ...]) -> None:
        unread = {name for name, value in self.fields.items() if value not in (None, False, 0, "", [], {})}
        names = ", ".join(sorted(unread - self.read - set(idle)))
        if names:
            logging.warning("config.json: %s has fields that change nothing here: %s", self.key, names)


def short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
