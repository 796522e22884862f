"""Items that the client adds to the conversation: the model reads, hears and sees them.

The user's messages become typed text. Messages of the system and the assistant, function calls and their results become
background text. Called by `protocol`.
"""

from __future__ import annotations

import secrets
import time
from functools import cached_property

import msgspec

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.messages import decode_data_url, fields_without_effect
from jaxtml.serve.protocols.realtime.conversation import FIRST, Item, RealtimeConversation
from jaxtml.serve.protocols.realtime.messages import (
    ContentPart,
    ConversationItem,
    FunctionCallItem,
    FunctionOutputItem,
    MessageItem,
)
from jaxtml.serve.sessions.client_session import BACKGROUND_UNREAD, ClientSession
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake, check_length
from jaxtml.serve.transport.sound import SoundDecoder, SoundFormat
from jaxtml.stream.tokens import Control

_TEXT_TOKENS = 8_192  # of one item
_RECORDING = SoundFormat("pcm", 24_000)  # of sound in an item, whatever the session's format is
_UNSEEN = "the model sees one new picture at a time: of several pictures in a message it sees only the last"

# The fields that a part of each type may have. The transcript beside a recording is for the client alone, as in
# OpenAI's API: the model hears the recording. A transcript without a recording is text.
_PART_FIELDS = {
    "input_text": ("text",),
    "input_audio": ("audio", "transcript"),
    "input_image": ("image_url",),
    "output_text": ("text",),
    "output_audio": ("transcript",),
    "text": ("text",),
}


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

    async def create(self, item: ConversationItem, previous_id: str | None) -> None:
        """Adds an item. The model gets all of it, or nothing if an error is raised.

        A model that reads no background text does not get the parts of an item that would become background text. The
        item then says so in its field `no_effect`.

        The `Intake` keeps sound that the session has no room for. Await `Intake.wait_for_room` afterwards, to hold the
        client back until the session has taken this sound.

        Args:
          item: the item.
          previous_id: id of the item after which it comes; "root": it comes first; None: it comes last.

        Raises:
          InvalidMessage: what is wrong with the item.
          ValueError: the item has sound or a picture that cannot be read.
        """
        if item.id in self.conversation.items:
            raise InvalidMessage("item_create_duplicate_item_id", "there is already an item with this id", "item.id")
        if item.id == FIRST:
            raise InvalidMessage("invalid_value", f'"{FIRST}" is the place before all items, and no id', "item.id")
        self.conversation.check_place(previous_id)
        match item:
            case MessageItem():
                await self._give_message(item)
            case FunctionOutputItem():
                self._give_function_output(item)
            case FunctionCallItem():
                self._give_background(f"{item.name}({item.arguments})", "item.arguments")
                if item.call_id is not None:
                    self.conversation.expect_result(item.call_id, None)
        resource = self._resource(item)
        self.conversation.add(resource, previous_id)
        self.conversation.finish(resource)

    def _give_background(self, text: str, param: str) -> None:
        """Gives the model text that the user did not type, if the model reads such text. Raises `InvalidMessage`."""
        check_length(self.intake.model, text, _TEXT_TOKENS, param)
        if self.intake.model.reads_background:
            self.intake.queue_text(Control.BACKGROUND, text, param, _TEXT_TOKENS)

    def _give_function_output(self, item: FunctionOutputItem) -> None:
        calls = self.conversation.pending_calls
        if item.call_id not in calls:
            text = "no function call with this id waits for a result"
            raise InvalidMessage("item_call_id_not_found", text, "item.call_id")
        if item.output:
            self._give_background(item.output, "item.output")
        called_at = calls.pop(item.call_id)
        if called_at is not None:
            self.metrics.delegations.observe(time.monotonic() - called_at)
            self.session.span.add_event("delegation answered", {"id": item.call_id})

    async def _give_message(self, item: MessageItem) -> None:
        """Gives the model all parts of a message, or nothing if a part is refused or the connection is lost meanwhile.

        Of several pictures only the last is decoded: the model sees one new picture per micro-turn.
        """
        texts: list[str] = []
        recordings: list[bytes] = []
        picture = None
        for n, part in enumerate(item.content):
            where = f"item.content[{n}]"
            _check_part(part, item.role, where)
            if part.audio:
                recordings.append(part.audio)
            elif part.image_url:
                picture = _read_picture(part.image_url, f"{where}.image_url")
            else:
                texts.append(part.text or part.transcript or "")
        text = "\n".join(texts)
        mark = Control.TYPED if item.role == "user" else Control.BACKGROUND
        if text:
            check_length(self.intake.model, text, _TEXT_TOKENS, "item.content")
        reads = mark is Control.TYPED or self.intake.model.reads_background
        tokens = self.intake.read_text(mark, text, "item.content", _TEXT_TOKENS) if text and reads else []
        patches = None if picture is None else await self.intake.read_image(picture)
        await self.intake.wait_for_room()
        # Nothing below awaits. So a connection that is lost cannot leave the model with half of the message.
        if tokens:
            self.intake.queue_tokens(mark, tokens)
        if patches is not None:
            self.session.scheduled.set_patches(patches)
        for recording in recordings:
            whole = len(recording) // _RECORDING.width * _RECORDING.width  # without half of a sample at the end
            samples = _RECORDING.decode(recording[:whole])
            self.intake.push_nowait(self._recording_decoder.resample(samples))

    def _resource(self, item: ConversationItem) -> Item:
        """Returns an item as events show it: without sound and pictures, and without fields that had no effect."""
        resource = msgspec.to_builtins(item, enc_hook=lambda recording: None) | {
            "object": "realtime.item",
            "status": "completed",
        }
        resource.pop("phase", None)
        for part in resource.get("content", ()):
            for name in ("audio", "image_url", "detail"):
                part.pop(name, None)
        resource["id"] = item.id or f"item_{secrets.token_urlsafe(12)}"
        no_effect = fields_without_effect(item)
        if isinstance(item, MessageItem):
            pictures = [n for n, part in enumerate(item.content) if part.image_url]
            no_effect |= {f"content[{n}].image_url": _UNSEEN for n in pictures[:-1]}
        if not self.intake.model.reads_background:
            match item:
                case MessageItem() if item.role != "user":
                    no_effect["content"] = BACKGROUND_UNREAD
                case FunctionOutputItem() if item.output:
                    no_effect["output"] = BACKGROUND_UNREAD
                case FunctionCallItem():
                    no_effect["arguments"] = BACKGROUND_UNREAD
        return resource | ({"no_effect": no_effect} if no_effect else {})

    @cached_property
    def _recording_decoder(self) -> SoundDecoder:
        return SoundDecoder(_RECORDING)


def _check_part(part: ContentPart, role: str, where: str) -> None:
    """Checks that one part of a message has what its type says, and nothing else.

    Args:
      part: the part.
      role: the message's role.
      where: path of the part, for errors.

    Raises:
      InvalidMessage: the part is empty, or has a field of another type of part, or only the user may send such a part.
    """
    given = [name for name in ("text", "audio", "transcript", "image_url") if getattr(part, name)]
    if not given:
        raise InvalidMessage("invalid_value", f"{where} is empty", where)
    if foreign := [name for name in given if name not in _PART_FIELDS[part.type]]:
        text = f"a part of type {part.type} has no {foreign[0]}"
        raise InvalidMessage("invalid_value", text, f"{where}.{foreign[0]}")
    if role != "user" and (part.audio or part.image_url):
        raise InvalidMessage("invalid_value", f"a message of the {role} has no sound or pictures: send text", where)


def _read_picture(url: str, param: str) -> bytes:
    """Returns the picture in a `data:` URL. Raises `InvalidMessage` on any other URL."""
    try:
        return decode_data_url(url)
    except ValueError as error:
        raise InvalidMessage("invalid_value", str(error), param) from error
