"""Helpers that the tests of configs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxtml.errors import InputError


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _refused(message: str, function: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.fixture(scope="session")
def leaves() -> Callable[..., Iterator[tuple[str, Any]]]:
    """`leaves(config)`: path and value of every field that is not itself a dataclass."""
    return _leaves


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """`refused(message, function, *args)`: calls and expects an `InputError` of one line that matches `message`."""
    return _refused
