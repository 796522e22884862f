"""One response of the Realtime API: its items, their parts and their deltas, as events in order.

The order is the one that clients of the API rely on: the response is created, then an item, then a part of the item,
then deltas. At the end, the part, the item and the response are completed, in this order. Called by `responses`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtml.serve.protocols.realtime.conversation import Item, RealtimeConversation
from jaxtml.serve.protocols.realtime.events import EventWriter
from jaxtml.serve.protocols.realtime.messages import MaxTokens, Tool
from jaxtml.stream.timebase import MICRO_TURN_MS


@dataclass(frozen=True)
class ResponseSettings:
    """What one response is made with: what the client asked of the response, and otherwise what its session has.

    Attributes:
      modality: "audio" (with a transcript) or "text".
      tools: functions that a delegation may call.
      tool_choice: "auto", or "none": a delegation calls no function.
      parallel_tool_calls: whether the response may have several function calls.
      max_output_tokens: the most tokens that the model generates for the response; "inf": there is no limit.
      metadata: from the client's `response.create`; sent back unchanged.
      no_effect: fields of the client's `response.create` that have no effect, by path, with the reason.
    """

    modality: str
    tools: Sequence[Tool]
    tool_choice: str
    parallel_tool_calls: bool
    max_output_tokens: MaxTokens
    metadata: Mapping[str, str] | None = None
    no_effect: Mapping[str, str] = field(default_factory=dict)


class Response:
    """A response in progress. The constructor sends `response.created`.

    Args:
      events: writes the events.
      conversation: takes the response's items.
      settings: what the response is made with.

    Attributes:
      id: id of the response.
      message: the item of what the model says; None: the model has said nothing yet.
      output: all items of the response.
      text: what the model has said so far.
      tokens: number of tokens that the model has generated for the response.
    """

    def __init__(self, events: EventWriter, conversation: RealtimeConversation, settings: ResponseSettings):
        self.events, self.conversation, self.settings = events, conversation, settings
        self.modality, self.tokens = settings.modality, 0
        self.id = f"resp_{secrets.token_urlsafe(12)}"
        self.message: Item | None = None
        self.output: list[Item] = []
        self.text = ""
        events.send("response.created", response=self._resource("in_progress"))

    @property
    def is_full(self) -> bool:
        """Whether the response has reached its limit of tokens."""
        limit = self.settings.max_output_tokens
        return not isinstance(limit, str) and self.tokens >= limit

    def add_speech(self, text: str, sound: bytes | None, tokens: int) -> None:
        """Adds what the model says in one micro-turn.

        The limit of tokens is checked after a micro-turn, so the last micro-turn may exceed it by some tokens.

        Args:
          text: words; may be empty.
          sound: the voice, in the client's format; None: the client has it on a track.
          tokens: number of tokens that the model generated for it.
        """
        self.tokens += tokens
        if self.message is None:
            self.message = self._begin_message()
        self.text += text
        where = self._where(self.message)
        if self.modality == "text":
            if text:
                self.events.send("response.output_text.delta", delta=text, **where)
            return
        self.conversation.add_sound(self.message["id"], MICRO_TURN_MS)
        if text:
            self.events.send("response.output_audio_transcript.delta", delta=text, **where)
        if sound is not None:
            self.events.send("response.output_audio.delta", delta=sound, **where)

    def add_function_call(self, name: str, arguments: str) -> str:
        """Adds a call of the client's function. Returns the call id."""
        call_id = f"call_{secrets.token_urlsafe(12)}"
        item = {
            "id": f"item_{secrets.token_urlsafe(12)}",
            "object": "realtime.item",
            "type": "function_call",
            "status": "in_progress",
            "name": name,
            "call_id": call_id,
            "arguments": "",
        }
        self._add(item)
        where = {"response_id": self.id, "item_id": item["id"], "output_index": len(self.output) - 1}
        where["call_id"] = call_id
        self.events.send("response.function_call_arguments.delta", delta=arguments, **where)
        self.events.send("response.function_call_arguments.done", arguments=arguments, name=name, **where)
        item.update(arguments=arguments, status="completed")
        self._finish(item)
        return call_id

    def end(self, status: str = "completed", reason: str | None = None) -> None:
        """Completes the response. `reason` says why the status is not "completed"."""
        if self.message is not None:
            self._end_message(self.message, "completed" if status == "completed" else "incomplete")
        details = {"type": status} | ({"reason": reason} if reason else {})
        self.events.send("response.done", response=self._resource(status) | {"status_details": details})
        self.events.send("rate_limits.updated", rate_limits=[])

    def _begin_message(self) -> Item:
        message = {
            "id": f"item_{secrets.token_urlsafe(12)}",
            "object": "realtime.item",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._add(message)
        empty = {"type": "text", "text": ""} if self.modality == "text" else {"type": "audio", "transcript": ""}
        self.events.send("response.content_part.added", part=empty, **self._where(message))
        return message

    def _end_message(self, message: Item, status: str) -> None:
        where = self._where(message)
        if self.modality == "text":
            self.events.send("response.output_text.done", text=self.text, **where)
            part = {"type": "text", "text": self.text}
            content = {"type": "output_text", "text": self.text}
        else:
            self.events.send("response.output_audio.done", **where)
            self.events.send("response.output_audio_transcript.done", transcript=self.text, **where)
            part = {"type": "audio", "transcript": self.text}
            cut = message["id"] in self.conversation.truncated
            content = {"type": "output_audio"} | ({} if cut else {"transcript": self.text})
        self.events.send("response.content_part.done", part=part, **where)
        message["content"] = [content]
        message["status"] = status
        self._finish(message)

    def _add(self, item: Item) -> None:
        self.output.append(item)
        where = {"response_id": self.id, "output_index": len(self.output) - 1}
        self.events.send("response.output_item.added", item=dict(item), **where)
        self.conversation.add(item)

    def _finish(self, item: Item) -> None:
        where = {"response_id": self.id, "output_index": self.output.index(item)}
        self.events.send("response.output_item.done", item=dict(item), **where)
        self.conversation.finish(item)

    def _where(self, message: Item) -> dict[str, Any]:
        """Returns the fields that say to which part of which item an event belongs."""
        index = self.output.index(message)
        return {"response_id": self.id, "item_id": message["id"], "output_index": index, "content_index": 0}

    def _resource(self, status: str) -> dict[str, Any]:
        """Returns the response as events show it."""
        settings = self.settings
        resource = {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "output": [dict(item) for item in self.output],
            "conversation_id": self.conversation.id,
            "output_modalities": [self.modality],
            "max_output_tokens": settings.max_output_tokens,
            "metadata": settings.metadata,
        }
        return resource | ({"no_effect": settings.no_effect} if settings.no_effect else {})
