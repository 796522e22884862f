"""What a client of OpenAI's Realtime API may say, as types (`openai.types.realtime` of the `openai` package).

What this server has no use for is taken and not held to: `_Ignored` fields are named in no session that it sends back.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from jaxtml.serve.protocols.messages import Event, MessageTypes, Name, Strict
from jaxtml.serve.transport.sound import SoundFormat

_Ignored = Any


class Pcm(Strict, tag_field="type", tag="audio/pcm"):
    rate: Literal[24000] | None = None


class Pcmu(Strict, tag_field="type", tag="audio/pcmu"):
    rate: Literal[8000] | None = None


class Pcma(Strict, tag_field="type", tag="audio/pcma"):
    rate: Literal[8000] | None = None


AudioFormat = Pcm | Pcmu | Pcma


class TurnDetection(Strict, kw_only=True):
    """The model decides itself when to speak: what would tune a detector is taken and not held to."""

    type: Literal["server_vad", "semantic_vad"]
    create_response: bool | None = None
    interrupt_response: bool | None = None
    threshold: _Ignored = None
    prefix_padding_ms: _Ignored = None
    silence_duration_ms: _Ignored = None
    idle_timeout_ms: _Ignored = None
    eagerness: _Ignored = None


class AudioInput(Strict):
    format: AudioFormat | None | msgspec.UnsetType = msgspec.UNSET
    turn_detection: TurnDetection | None | msgspec.UnsetType = msgspec.UNSET
    transcription: _Ignored = None
    noise_reduction: _Ignored = None


class AudioOutput(Strict):
    format: AudioFormat | None | msgspec.UnsetType = msgspec.UNSET
    voice: _Ignored = None
    speed: _Ignored = None


class RealtimeAudio(Strict):
    input: AudioInput | None = None
    output: AudioOutput | None = None


class Tool(Strict, kw_only=True):
    type: Literal["function"]
    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: _Ignored = None


Modality = Literal["audio", "text"]


class RealtimeSessionConfig(Strict, kw_only=True):
    type: Literal["realtime"]
    model: str | None = None
    audio: RealtimeAudio | None = None
    instructions: str | None = None
    output_modalities: list[Modality] | None = None
    tools: list[Tool] | None = None
    tool_choice: _Ignored = None
    parallel_tool_calls: _Ignored = None
    include: _Ignored = None
    max_output_tokens: _Ignored = None
    prompt: _Ignored = None
    reasoning: _Ignored = None
    tracing: _Ignored = None
    truncation: _Ignored = None


class Expiry(Strict):
    """Seconds from the making of a short-lived key."""

    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, msgspec.Meta(ge=10, le=7200)] = 600


class SecretRequest(Strict):
    """The body of a request for one."""

    expires_after: Expiry = msgspec.field(default_factory=Expiry)
    session: RealtimeSessionConfig | None = None


class ResponseConfig(Strict):
    metadata: Annotated[dict[Name, Name], msgspec.Meta(max_length=16)] | None = None
    instructions: str | None = None
    output_modalities: list[Modality] | None = None
    audio: _Ignored = None
    conversation: _Ignored = None
    input: list[dict[str, Any]] | None = None
    max_output_tokens: _Ignored = None
    parallel_tool_calls: _Ignored = None
    prompt: _Ignored = None
    reasoning: _Ignored = None
    tool_choice: _Ignored = None
    tools: list[Tool] | None = None


class Content(Strict, kw_only=True):
    type: Literal["input_text", "input_audio", "input_image", "output_text", "output_audio", "text"]
    text: str | None = None
    audio: bytes | None = None
    transcript: str | None = None
    image_url: str | None = None
    detail: _Ignored = None


class MessageItem(Strict, tag_field="type", tag="message", kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Content], msgspec.Meta(max_length=64)]
    id: Name | None = None
    object: Name | None = None
    status: Name | None = None
    phase: _Ignored = None


class OutputItem(Strict, tag_field="type", tag="function_call_output", kw_only=True):
    call_id: Name
    output: str
    id: Name | None = None
    object: Name | None = None
    status: Name | None = None


class CallItem(Strict, tag_field="type", tag="function_call", kw_only=True):
    name: Name
    arguments: str
    call_id: Name | None = None
    id: Name | None = None
    object: Name | None = None
    status: Name | None = None


ConversationItem = MessageItem | OutputItem | CallItem


class RealtimeUpdate(Event, tag="session.update", kw_only=True):
    session: RealtimeSessionConfig


class Append(Event, tag="input_audio_buffer.append", kw_only=True):
    audio: bytes


class Commit(Event, tag="input_audio_buffer.commit"):
    pass


class Clear(Event, tag="input_audio_buffer.clear"):
    pass


class ItemCreate(Event, tag="conversation.item.create", kw_only=True):
    item: ConversationItem
    previous_item_id: str | None = None


class ItemRetrieve(Event, tag="conversation.item.retrieve", kw_only=True):
    item_id: Name


class ItemDelete(Event, tag="conversation.item.delete", kw_only=True):
    item_id: Name


class ItemTruncate(Event, tag="conversation.item.truncate", kw_only=True):
    item_id: Name
    content_index: int
    audio_end_ms: int


class ClearOutput(Event, tag="output_audio_buffer.clear"):
    """Of those who have a track."""


class ResponseCreate(Event, tag="response.create", kw_only=True):
    response: ResponseConfig | None = None


class ResponseCancel(Event, tag="response.cancel", kw_only=True):
    response_id: str | None = None


_Shared = (
    RealtimeUpdate
    | Commit
    | Clear
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
)
Message = Append | _Shared
PeerMessage = ClearOutput | _Shared
CLIENT = MessageTypes[Message](Message, unsupported=("output_audio_buffer.clear",))
PEER = MessageTypes[PeerMessage](PeerMessage, Append)  # of one who has a track


def format_of(given: AudioFormat) -> SoundFormat:
    kind = str(given.__struct_config__.tag).removeprefix("audio/")
    return SoundFormat(kind, 24_000 if kind == "pcm" else 8_000)
