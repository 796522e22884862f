"""A response of the Realtime API: what the model says while its gate is open, as items, parts and deltas in order.

The order is the one that clients of the API rely on: created, item, part, deltas, and all of it done inside out.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from jaxtml.serve.protocols.realtime.messages import Tool

Emit = Callable[..., None]


class Response:
    """One response in progress; `response.created` is sent when it is made.

    Args:
      emit: takes a type and the fields of an event.
      modality: "audio" (with its transcript) or "text".
      conversation: its id.
      metadata: of the client's `response.create`, given back.
      keep: takes each conversation item when it is added, and again when it is done.
    """

    def __init__(
        self,
        emit: Emit,
        modality: str,
        conversation: str,
        metadata: Mapping[str, str] | None,
        keep: Callable[[dict[str, Any], bool], None],
    ):
        self.id = f"resp_{secrets.token_urlsafe(12)}"
        self.emit, self.keep = emit, keep
        self.modality, self.conversation, self.metadata = modality, conversation, metadata
        self.message: dict[str, Any] | None = None  # the item of what is said
        self.output: list[dict[str, Any]] = []
        self.text = ""
        self.audible = False
        emit("response.created", response=self._resource("in_progress"))

    def say(self, text: str, sound: bytes | None) -> None:
        """A piece of what is said: its text, and its sound where the client wants sound; None: it has it elsewhere."""
        if self.message is None:
            self._begin()
        self.text += text
        where = self._where(self.message)
        if self.modality == "text":
            if text:
                self.emit("response.output_text.delta", delta=text, **where)
            return
        if text:
            self.emit("response.output_audio_transcript.delta", delta=text, **where)
        if sound is not None:
            self.emit("response.output_audio.delta", delta=sound, **where)

    def call(self, name: str, arguments: str) -> dict[str, Any]:
        """A call of the client's function; its item."""
        item = {
            "id": f"item_{secrets.token_urlsafe(12)}",
            "object": "realtime.item",
            "type": "function_call",
            "status": "in_progress",
            "name": name,
            "call_id": f"call_{secrets.token_urlsafe(12)}",
            "arguments": "",
        }
        self._add(item)
        where = {"response_id": self.id, "item_id": item["id"], "output_index": len(self.output) - 1}
        where["call_id"] = item["call_id"]
        self.emit("response.function_call_arguments.delta", delta=arguments, **where)
        self.emit("response.function_call_arguments.done", arguments=arguments, name=name, **where)
        item.update(arguments=arguments, status="completed")
        self._done(item)
        return item

    def end(self, status: str = "completed", reason: str | None = None) -> None:
        """All of it is done; `reason` says why a status is not "completed"."""
        if self.message is not None:
            where, item = self._where(self.message), self.message
            if self.modality == "text":
                self.emit("response.output_text.done", text=self.text, **where)
                part: dict[str, Any] = {"type": "text", "text": self.text}
            else:
                self.emit("response.output_audio.done", **where)
                self.emit("response.output_audio_transcript.done", transcript=self.text, **where)
                part = {"type": "audio", "transcript": self.text}
            self.emit("response.content_part.done", part=part, **where)
            kind = "output_text" if self.modality == "text" else "output_audio"
            said = "text" if self.modality == "text" else "transcript"
            item["content"] = [{"type": kind, said: self.text}]
            item["status"] = "completed" if status == "completed" else "incomplete"
            self._done(item)
        details = {"type": status} | ({"reason": reason} if reason else {})
        self.emit("response.done", response=self._resource(status) | {"status_details": details})
        self.emit("rate_limits.updated", rate_limits=[])

    def _begin(self) -> None:
        self.message = {
            "id": f"item_{secrets.token_urlsafe(12)}",
            "object": "realtime.item",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._add(self.message)
        empty = {"type": "text", "text": ""} if self.modality == "text" else {"type": "audio", "transcript": ""}
        self.emit("response.content_part.added", part=empty, **self._where(self.message))

    def _add(self, item: dict[str, Any]) -> None:
        self.output.append(item)
        where = {"response_id": self.id, "output_index": len(self.output) - 1}
        self.emit("response.output_item.added", item=dict(item), **where)
        self.keep(item, False)

    def _done(self, item: dict[str, Any]) -> None:
        where = {"response_id": self.id, "output_index": self.output.index(item)}
        self.emit("response.output_item.done", item=dict(item), **where)
        self.keep(item, True)

    def _where(self, item: dict[str, Any] | None) -> dict[str, Any]:
        assert item is not None
        index = self.output.index(item)
        return {"response_id": self.id, "item_id": item["id"], "output_index": index, "content_index": 0}

    def _resource(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "output": [dict(item) for item in self.output],
            "conversation_id": self.conversation,
            "output_modalities": [self.modality],
            "metadata": self.metadata,
        }


def call_of(task: str, tools: list[Tool]) -> tuple[str, str]:
    """Which function a delegation is for, and its arguments as JSON.

    A task that begins with a tool's name is for that one, any other for the first. What follows is its arguments where
    it is a JSON object; else it is the first string among those that the tool requires, or has. A schema that is none
    has no arguments.
    """
    task = task.strip()
    named = next((one for one in tools if re.match(rf"{re.escape(one.name)}(?![\w-])", task)), None)
    tool = named or tools[0]
    rest = (task.removeprefix(tool.name) if named else task).strip(" :()")
    try:
        given = json.loads(rest)
    except ValueError:
        given = None
    if isinstance(given, dict):
        return tool.name, json.dumps(given)
    schema = tool.parameters or {}
    required, properties = schema.get("required"), schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    names = (
        [name for name in required if isinstance(name, str) and name in properties]
        if isinstance(required, list)
        else []
    )
    texts = [name for name in (*names, *properties) if _is_text(properties[name])]
    return tool.name, json.dumps({texts[0]: rest} if texts else {})


def _is_text(schema: Any) -> bool:
    kind = schema.get("type", "string") if isinstance(schema, dict) else None
    return kind == "string" or isinstance(kind, list) and "string" in kind
