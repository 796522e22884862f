"""The rules for the values of config fields: part of a field's type, and checked by one function.

    steps: Annotated[int, Range(1, LARGEST_INT)] = 1000
    remat: Annotated[str, OneOf("none", "outputs", "full")] = "none"

`jaxtml.config.tree` declares its fields with these rules. A field that may be None is not checked where it is None. A
rule between several fields is not written here: the class that owns the fields has a `check` method.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, get_args, get_origin, get_type_hints

from jaxtml.errors import InputError

LARGEST_INT = 2**31 - 1  # sizes and counts become int32 in compiled programs


@dataclass(frozen=True)
class Range:
    """A rule for a number: it is finite and lies between `least` and `most`.

    Attributes:
      least: the smallest number; itself not allowed if `open_below`.
      most: the largest number, itself allowed.
      open_below: whether a number has to be larger than `least`.
    """

    least: float = 0
    most: float = math.inf
    open_below: bool = False

    def problem(self, value: object) -> str | None:
        """Returns the advice for a value that is not allowed, as in "give at least 1"; None for an allowed value."""
        if not isinstance(value, int | float) or not -math.inf < value < math.inf:  # refuses NaN too
            return "give a finite number"
        if value < self.least or (self.open_below and value == self.least):
            return f"give {'more than' if self.open_below else 'at least'} {self.least}"
        if value > self.most:
            return f"give at most {self.most}"
        return None


class OneOf:
    """A rule for a string: it is one of `choices`."""

    def __init__(self, *choices: str):
        self.choices = choices

    def problem(self, value: object) -> str | None:
        """Returns the advice for a value that is not allowed, as in "give ring or ragged"; None if it is allowed."""
        return None if value in self.choices else f"give {' or '.join(self.choices)}"


PositiveInt = Annotated[int, Range(1, LARGEST_INT)]
NonNegativeInt = Annotated[int, Range(0, LARGEST_INT)]
LayerCount = Annotated[int, Range(1, 4096)]  # no model has more layers: a larger number is a typing mistake
PositiveFloat = Annotated[float, Range(0, open_below=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Dtype = Annotated[str, OneOf("float32", "bfloat16")]


def check_fields(node: object, prefix: str = "") -> None:
    """Checks every field of a dataclass, and of the dataclasses in it, against the rule in the field's type.

    Args:
      node: the dataclass.
      prefix: the path of `node` in the config, ending in a dot; "" for the config itself.

    Raises:
      InputError: a field has a value that its rule does not allow. The message has the path, the value and the
        advice.
    """
    for name, hint in get_type_hints(type(node), include_extras=True).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{name}.")
            continue
        for rule in rules_of(hint):
            problem = None if value is None else rule.problem(value)
            if problem is not None:
                raise InputError(f"{prefix}{name} {value!r:.60}: {problem}")


def rules_of(hint: object) -> list[Range | OneOf]:
    """Returns the rules in a field's type. The type may also be a union of None and a type with rules."""
    if get_origin(hint) is Annotated:
        return [rule for rule in get_args(hint)[1:] if isinstance(rule, Range | OneOf)]
    return [rule for part in get_args(hint) for rule in rules_of(part)]
