"""One response of the Realtime API: its items, their parts and their deltas, as events in order.

The order is the one that clients of the API rely on: the response is created, then an item, then a part of the item,
then deltas. At the end, the part, the item and the response are completed, in this order. Called by `responses`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from jaxtml.serve.protocols.realtime.conversation import Item, RealtimeConversation
from jaxtml.serve.protocols.realtime.events import EventWriter


class Response:
    """A response in progress. The constructor sends `response.created`.

    Args:
      events: writes the events.
      conversation: takes the response's items.
      modality: "audio" (with a transcript) or "text".
      metadata: from the client's `response.create`; sent back unchanged.

    Attributes:
      id: id of the response.
      message: the item of what the model says; None: the model has said nothing yet.
      output: all items of the response.
      text: what the model has said so far.
    """

    def __init__(
        self,
        events: EventWriter,
        conversation: RealtimeConversation,
        modality: str,
        metadata: Mapping[str, str] | None,
    ):
        self.events, self.conversation, self.modality, self.metadata = events, conversation, modality, metadata
        self.id = f"resp_{secrets.token_urlsafe(12)}"
        self.message: Item | None = None
        self.output: list[Item] = []
        self.text = ""
        events.send("response.created", response=self._resource("in_progress"))

    def add_speech(self, text: str, sound: bytes | None) -> None:
        """Adds what the model says in one micro-turn.

        Args:
          text: words; may be empty.
          sound: the voice, in the client's format; None: the client has it on a track.
        """
        if self.message is None:
            self.message = self._begin_message()
        self.text += text
        where = self._where(self.message)
        if self.modality == "text":
            if text:
                self.events.send("response.output_text.delta", delta=text, **where)
            return
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
            content = {"type": "output_audio", "transcript": self.text}
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
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "output": [dict(item) for item in self.output],
            "conversation_id": self.conversation.id,
            "output_modalities": [self.modality],
            "metadata": self.metadata,
        }
