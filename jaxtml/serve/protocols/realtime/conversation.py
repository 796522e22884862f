"""The conversation of one session of the Realtime API: its items, and the function calls that wait for a result.

Everything that is said becomes an item: user turns (`user_turn`), responses (`response`) and what the client adds
(`client_items`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Any

from jaxtml.serve.protocols.realtime.events import EventWriter
from jaxtml.serve.sessions.errors import InvalidMessage

_KEPT = 256  # items, and function calls without a result
_UNKNOWN_ITEM = f"there is no item with this id; the server keeps the last {_KEPT} items of a conversation"

Item = dict[str, Any]

FIRST = "root"  # as `previous_item_id`: before all items


class RealtimeConversation:
    """The items of one session, of which the 256 that were added last are kept.

    The order of the items is the client's: it may put an item between others. The model has no such choice. It reads
    and hears everything in the order in which it arrives. An item that still grows is always kept.

    A client may delete an item that still grows, for example the message of a response in progress. The conversation
    then sends nothing more about the item. The response goes on: its own events, such as `response.output_item.done`,
    come as in OpenAI's API, which sends them whatever becomes of the response.

    Attributes:
      id: id of the conversation.
      items: items by id, in the order of the conversation.
      sound_ms: duration of the model's sound in an item, by the item's id; items without such sound are left out.
      truncated: ids of the items whose sound the client has cut.
      pending_calls: the function calls that wait for a result. Keys are call ids. Values are the times at which the
        model made the calls, on the monotonic clock. None: the client added the call, from an earlier conversation.
    """

    def __init__(self, events: EventWriter):
        self.events = events
        self.id = f"conv_{secrets.token_urlsafe(12)}"
        self.items: OrderedDict[str, Item] = OrderedDict()
        self._added: dict[str, None] = {}  # ids of the items in the order in which they were added
        self.sound_ms: dict[str, int] = {}
        self.truncated: set[str] = set()
        self.pending_calls: OrderedDict[str, float | None] = OrderedDict()

    def last_id(self) -> str | None:
        """Returns the id of the last item; None: there are no items."""
        return next(reversed(self.items), None)

    def check_place(self, previous_id: str | None) -> None:
        """Checks a client's `previous_item_id`; None: the client gave none. Raises `InvalidMessage` on a wrong id."""
        if previous_id not in (None, FIRST) and previous_id not in self.items:
            raise InvalidMessage("item_create_invalid_previous_item_id", _UNKNOWN_ITEM, "previous_item_id")

    def add(self, item: Item, previous_id: str | None = None) -> None:
        """Adds an item that may still grow.

        Args:
          item: the item.
          previous_id: a client's `previous_item_id`, checked; None: the item comes last. If that item has been
            dropped since the check, because many others were added, the new item comes first.
        """
        ids = list(self.items)
        if previous_id is None:
            following: list[str] = []
        else:
            following = ids[ids.index(previous_id) + 1 :] if previous_id in self.items else ids
        self.items[item["id"]] = item
        self._added[item["id"]] = None
        for name in following:
            self.items.move_to_end(name)
        self._send("added", item)
        while len(self.items) > _KEPT:
            self._forget(next(name for name in self._added if self.items[name].get("status") != "in_progress"))

    def finish(self, item: Item) -> None:
        """Sends an item that has been added and is now complete, unless the client has deleted it."""
        if self.has(item):
            self._send("done", item)

    def has(self, item: Item) -> bool:
        """Returns whether an item is in the conversation: not if it was deleted, or dropped for newer items."""
        return self.items.get(item["id"]) is item

    def retrieve(self, item_id: str) -> None:
        """Sends an item to the client. Raises `InvalidMessage` if there is no such item."""
        self.events.send("conversation.item.retrieved", item=self._find(item_id, "retrieve"))

    def delete(self, item_id: str) -> None:
        """Deletes an item. Raises `InvalidMessage` if there is no such item."""
        self._find(item_id, "delete")
        self._forget(item_id)
        self.events.send("conversation.item.deleted", item_id=item_id)

    def truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> None:
        """Cuts the sound of one of the model's items to what the client has played.

        The item loses its transcript, as in OpenAI's API: the transcript has words that the client has not played. The
        model itself has said the words, and does not forget them.

        Raises:
          InvalidMessage: there is no such item, it has no sound of the model, or the sound is not that long.
        """
        item = self._find(item_id, "truncate")
        sound_ms = self.sound_ms.get(item_id)
        if sound_ms is None:
            raise InvalidMessage("invalid_value", "Only model output audio messages can be truncated", "item_id")
        if content_index != 0:
            raise InvalidMessage("invalid_value", "the item has one part of content, part 0", "content_index")
        if audio_end_ms < 0:
            raise InvalidMessage("integer_below_min_value", "audio_end_ms must be 0 or more", "audio_end_ms")
        if audio_end_ms > sound_ms:
            text = f"Audio content of {sound_ms}ms is already shorter than {audio_end_ms}ms"
            raise InvalidMessage("invalid_value", text, "audio_end_ms")
        self.sound_ms[item_id] = audio_end_ms
        self.truncated.add(item_id)
        item["content"] = [{"type": "output_audio"} for _ in item["content"]]
        where = {"item_id": item_id, "content_index": content_index}
        self.events.send("conversation.item.truncated", audio_end_ms=audio_end_ms, **where)

    def add_sound(self, item_id: str, duration_ms: int) -> None:
        """Counts sound that the model adds to an item, unless the client has cut the item's sound."""
        if item_id in self.items and item_id not in self.truncated:
            self.sound_ms[item_id] = self.sound_ms.get(item_id, 0) + duration_ms

    def expect_result(self, call_id: str, called_at: float | None) -> None:
        """Lets the client give the result of a function call; `called_at` as in `pending_calls`."""
        self.pending_calls[call_id] = called_at
        while len(self.pending_calls) > _KEPT:
            self.pending_calls.popitem(last=False)

    def _send(self, name: str, item: Item) -> None:
        """Sends an item of the conversation with the id of the item before it; None: it is the first that is kept."""
        ids = list(self.items)
        place = ids.index(item["id"])
        previous_id = ids[place - 1] if place else None
        self.events.send(f"conversation.item.{name}", item=dict(item), previous_item_id=previous_id)

    def _forget(self, item_id: str) -> None:
        del self.items[item_id], self._added[item_id]
        self.sound_ms.pop(item_id, None)
        self.truncated.discard(item_id)

    def _find(self, item_id: str, action: str) -> Item:
        item = self.items.get(item_id)
        if item is None:
            raise InvalidMessage(f"item_{action}_invalid_item_id", _UNKNOWN_ITEM, "item_id")
        return item
