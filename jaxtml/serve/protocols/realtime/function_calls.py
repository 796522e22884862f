"""Turns a delegation into a call of one of the client's functions. Called by `responses`.

A delegation is a task that the model hands over, in words. The words select the function and its arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxtml.serve.protocols.realtime.messages import Tool
from jaxtml.strict_json import dumps


def function_call(task: str, tools: Sequence[Tool]) -> tuple[str, str]:
    """Returns the name and the JSON arguments of the function that a delegation calls.

    A task that begins with the name of a tool calls that tool; any other task calls the first tool. The rest of the
    task is the arguments if it is a JSON object. Otherwise it is the value of one string parameter: the first that the
    tool requires, or else the first that the tool has. If the tool's schema has no string parameter, there are no
    arguments.

    Args:
      task: text of the delegation.
      tools: functions of the client, at least one.
    """
    task = task.strip()
    named = next((tool for tool in tools if re.match(rf"{re.escape(tool.name)}(?![\w-])", task)), None)
    tool = named or tools[0]
    rest = (task.removeprefix(tool.name) if named else task).strip(" :()")
    try:
        arguments = json.loads(rest)
    except ValueError:
        arguments = None
    if isinstance(arguments, dict):
        return tool.name, dumps(arguments)
    parameter = _first_text_parameter(tool.parameters or {})
    return tool.name, dumps({} if parameter is None else {parameter: rest})


def _first_text_parameter(schema: dict[str, Any]) -> str | None:
    """Returns the name of the first string parameter in a JSON schema, required parameters first.

    The schema is the client's, so any part of it may be missing or of a wrong type.
    """
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return None
    required = schema.get("required")
    names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    return next((name for name in (*names, *properties) if name in properties and _is_text(properties[name])), None)


def _is_text(schema: Any) -> bool:
    kind = schema.get("type", "string") if isinstance(schema, dict) else None
    return kind == "string" or isinstance(kind, list) and "string" in kind
