"""Whatever the project writes as JSON can be read by every reader: it never has a bare NaN or Infinity."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from jaxtml.strict_json import dumps

ROOT = Path(__file__).parents[1]


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    value = {"loss": float("nan"), "terms": [1.5, (float("inf"), {"x": -float("inf")})], "text": "NaN", "step": 3}
    written = json.loads(dumps(value, indent=1), parse_constant=refuse)
    assert written == {"loss": None, "terms": [1.5, [None, {"x": None}]], "text": "NaN", "step": 3}


def test_finite_values_are_written_as_the_standard_library_writes_them():
    value = {"a": [1, 2.5, "x", None, True]}
    assert dumps(value, separators=(",", ":")) == json.dumps(value, separators=(",", ":"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        dumps({"a": object()})


def test_no_module_writes_json_in_another_way():
    """`json.dumps` and `json.dump` write NaN, unless `allow_nan=False` makes them fail."""
    found = []
    for folder in ("jaxtml", "tools", "launch", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file == ROOT / "jaxtml" / "strict_json.py":
                continue
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            found += [
                f"{file.relative_to(ROOT)}:{call.lineno}"
                for call in calls
                if ast.unparse(call.func) in ("json.dumps", "json.dump")
                and "allow_nan" not in {keyword.arg for keyword in call.keywords}
            ]
    assert not found, "write JSON with jaxtml.strict_json.dumps"
