"""Items that the client adds to the conversation: the model reads, hears and sees them.

The user's messages become typed text. Messages of the system and the assistant, function calls and their results become
background text. Called by `protocol`.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from functools import cached_property

import msgspec
import numpy as np

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.realtime.conversation import Item, RealtimeConversation
from jaxtml.serve.protocols.realtime.messages import (
    ConversationItem,
    FunctionCallItem,
    FunctionOutputItem,
    MessageItem,
)
from jaxtml.serve.sessions.client_session import ClientSession
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.transport.sound import SoundDecoder, SoundFormat
from jaxtml.stream.tokens import Control

_TEXT_TOKENS = 8_192  # of one item
_RECORDING = SoundFormat("pcm", 24_000)  # of sound in an item, whatever the session's format is


class ClientItems:
    """Adds the client's items to the conversation and gives them to the model.

    Args:
      session: the session.
      intake: takes text, sound and pictures for the model.
      conversation: the items of the session.
      metrics: measures how long function calls take.
    """

    def __init__(self, session: ClientSession, intake: Intake, conversation: RealtimeConversation, metrics: Metrics):
        self.session, self.intake, self.conversation, self.metrics = session, intake, conversation, metrics

    async def create(self, item: ConversationItem) -> None:
        """Adds an item. The model gets all of it, or nothing if an error is raised.

        The sound of a message may wait for room in the session: call `Intake.wait_for_room` afterwards.

        Raises:
          InvalidMessage: what is wrong with the item.
          ValueError: the item has sound or a picture that cannot be read.
        """
        if item.id in self.conversation.items:
            raise InvalidMessage("item_create_duplicate_item_id", "there is already an item with this id", "item.id")
        match item:
            case MessageItem():
                await self._give_message(item)
            case FunctionOutputItem():
                self._give_function_output(item)
            case FunctionCallItem():
                text = f"{item.name}({item.arguments})"
                self.intake.queue_text(Control.BACKGROUND, text, "item.arguments", _TEXT_TOKENS)
                if item.call_id is not None:
                    self.conversation.expect_result(item.call_id, None)
        resource = _resource(item)
        self.conversation.add(resource)
        self.conversation.finish(resource)

    def _give_function_output(self, item: FunctionOutputItem) -> None:
        calls = self.conversation.pending_calls
        if item.call_id not in calls:
            text = "no function call with this id waits for a result"
            raise InvalidMessage("item_call_id_not_found", text, "item.call_id")
        if item.output:
            self.intake.queue_text(Control.BACKGROUND, item.output, "item.output", _TEXT_TOKENS)
        called_at = calls.pop(item.call_id)
        if called_at is not None:
            self.metrics.delegations.observe(time.monotonic() - called_at)
            self.session.span.add_event("delegation answered", {"id": item.call_id})

    async def _give_message(self, item: MessageItem) -> None:
        """Gives the model all parts of a message, or nothing if a part is refused or the connection is lost meanwhile.

        Of several pictures only the last is decoded: the model sees one new picture per micro-turn.
        """
        texts: list[str] = []
        recordings: list[np.ndarray] = []
        picture = None
        for n, part in enumerate(item.content):
            where = f"item.content[{n}]"
            if part.type == "input_audio" and part.audio:
                recordings.append(_RECORDING.decode(part.audio))
            elif part.type == "input_image" and part.image_url is not None:
                picture = _read_data_url(part.image_url, f"{where}.image_url")
            elif text := part.text or part.transcript:
                texts.append(text)
            else:
                raise InvalidMessage("invalid_value", f"{where} is empty", where)
        tokens = self.intake.read_text("\n".join(texts), "item.content", _TEXT_TOKENS) if texts else []
        patches = None if picture is None else await self.intake.read_image(picture)
        await self.intake.wait_for_room()
        # Nothing below awaits. So a connection that is lost cannot leave the model with half of the message.
        if tokens:
            self.intake.queue_tokens(Control.TYPED if item.role == "user" else Control.BACKGROUND, tokens)
        if patches is not None:
            self.session.scheduled.set_patches(patches)
        for samples in recordings:
            self.intake.push_nowait(self._recording_decoder.resample(samples))

    @cached_property
    def _recording_decoder(self) -> SoundDecoder:
        return SoundDecoder(_RECORDING)


def _resource(item: ConversationItem) -> Item:
    """Returns an item as events show it: without sound and pictures, and without fields that had no effect."""
    resource = msgspec.to_builtins(item) | {"object": "realtime.item", "status": "completed"}
    resource.pop("phase", None)
    for part in resource.get("content", ()):
        is_media = bool(part.get("audio") or part.get("image_url"))
        unread = [name for name, unused in (("text", is_media), ("transcript", is_media or part.get("text"))) if unused]
        for name in ("audio", "image_url", "detail", *unread):
            part.pop(name, None)
    resource["id"] = item.id or f"item_{secrets.token_urlsafe(12)}"
    return resource


def _read_data_url(url: str, param: str) -> bytes:
    """Returns the picture in a `data:` URL. Raises `InvalidMessage` on any other URL."""
    head, _, data = url.partition(";base64,")
    if not head.startswith("data:image/"):
        raise InvalidMessage("invalid_value", "a picture must be a data: URL", param)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InvalidMessage("invalid_value", "a picture must be in base64", param) from error
