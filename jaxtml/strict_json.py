"""Writes JSON that every reader takes: NaN and the infinities become null.

JSON has no such numbers (RFC 8259, section 6). Python's `json.dumps` writes them as bare words all the same, and other
readers then refuse the whole line. Whatever jaxtml writes as JSON goes through `dumps`. tests/test_strict_json.py
checks that no module calls `json.dumps` without `allow_nan=False`.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Returns `value` as JSON, with null for NaN and for the infinities. `options` are those of `json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    """Returns a copy of a value for JSON with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
