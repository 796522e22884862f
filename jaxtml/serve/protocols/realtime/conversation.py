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

Item = dict[str, Any]


class RealtimeConversation:
    """The items of one session, of which the last 256 are kept.

    Attributes:
      id: id of the conversation.
      items: items by id, in the order in which they were added.
      pending_calls: the function calls that wait for a result. Keys are call ids. Values are the times at which the
        model made the calls, on the monotonic clock. None: the client added the call, from an earlier conversation.
    """

    def __init__(self, events: EventWriter):
        self.events = events
        self.id = f"conv_{secrets.token_urlsafe(12)}"
        self.items: OrderedDict[str, Item] = OrderedDict()
        self.pending_calls: OrderedDict[str, float | None] = OrderedDict()

    def last_id(self) -> str | None:
        """Returns the id of the last item; None: there are no items."""
        return next(reversed(self.items), None)

    def add(self, item: Item) -> None:
        """Adds an item that may still grow."""
        self._store("conversation.item.added", item)

    def finish(self, item: Item) -> None:
        """Stores an item that has been added and is now complete."""
        self._store("conversation.item.done", item)

    def retrieve(self, item_id: str) -> None:
        """Sends an item to the client. Raises `InvalidMessage` if there is no such item."""
        self.events.send("conversation.item.retrieved", item=self._find(item_id, "retrieve"))

    def delete(self, item_id: str) -> None:
        """Deletes an item. Raises `InvalidMessage` if there is no such item."""
        self._find(item_id, "delete")
        del self.items[item_id]
        self.events.send("conversation.item.deleted", item_id=item_id)

    def truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> None:
        """Acknowledges how much of an item the client has played. Raises `InvalidMessage` if there is no such item."""
        self._find(item_id, "truncate")
        where = {"item_id": item_id, "content_index": content_index}
        self.events.send("conversation.item.truncated", audio_end_ms=audio_end_ms, **where)

    def expect_result(self, call_id: str, called_at: float | None) -> None:
        """Lets the client give the result of a function call; `called_at` as in `pending_calls`."""
        self.pending_calls[call_id] = called_at
        while len(self.pending_calls) > _KEPT:
            self.pending_calls.popitem(last=False)

    def _store(self, kind: str, item: Item) -> None:
        previous_id = self.last_id() if item["id"] not in self.items else None
        self.items[item["id"]] = item
        while len(self.items) > _KEPT:
            self.items.popitem(last=False)
        self.events.send(kind, item=dict(item), previous_item_id=previous_id)

    def _find(self, item_id: str, action: str) -> Item:
        item = self.items.get(item_id)
        if item is None:
            raise InvalidMessage(
                f"item_{action}_invalid_item_id", "there is no such item, or the server no longer keeps it", "item_id"
            )
        return item
