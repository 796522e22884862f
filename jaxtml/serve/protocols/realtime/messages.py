"""The messages that a client of OpenAI's Realtime API may send, as types (`openai.types.realtime` of `openai`).

Fields of type `_Ignored` are accepted and have no effect: this server has no use for them, and names none of them in
the sessions that it sends back. Fields of type `bytes` are base64 in JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from jaxtml.serve.protocols.messages import Event, MessageTypes, Name, Strict
from jaxtml.serve.transport.sound import SoundFormat

_Ignored = Any

# --- the session


class RealtimePcm(Strict, tag_field="type", tag="audio/pcm"):
    """Signed 16-bit little-endian samples, mono, 24 kHz."""

    rate: Literal[24000] | None = None


class RealtimePcmu(Strict, tag_field="type", tag="audio/pcmu"):
    """G.711 mu-law, mono, 8 kHz."""

    rate: Literal[8000] | None = None


class RealtimePcma(Strict, tag_field="type", tag="audio/pcma"):
    """G.711 A-law, mono, 8 kHz."""

    rate: Literal[8000] | None = None


AudioFormat = RealtimePcm | RealtimePcmu | RealtimePcma


class TurnDetection(Strict, kw_only=True):
    """Asks the server to detect turns. The model itself decides when to speak, so a detector's settings are ignored."""

    type: Literal["server_vad", "semantic_vad"]
    create_response: bool | None = None
    interrupt_response: bool | None = None
    threshold: _Ignored = None
    prefix_padding_ms: _Ignored = None
    silence_duration_ms: _Ignored = None
    idle_timeout_ms: _Ignored = None
    eagerness: _Ignored = None


class AudioInput(Strict):
    """Sound of the user. A field that is absent stays as it is; `turn_detection: null` switches the detection off."""

    format: AudioFormat | None | msgspec.UnsetType = msgspec.UNSET
    turn_detection: TurnDetection | None | msgspec.UnsetType = msgspec.UNSET
    transcription: _Ignored = None
    noise_reduction: _Ignored = None


class AudioOutput(Strict):
    """Sound of the model."""

    format: AudioFormat | None | msgspec.UnsetType = msgspec.UNSET
    voice: _Ignored = None
    speed: _Ignored = None


class RealtimeAudio(Strict):
    """Sound in both directions."""

    input: AudioInput | None = None
    output: AudioOutput | None = None


class Tool(Strict, kw_only=True):
    """A function of the client that the model may call. `parameters` is a JSON schema."""

    type: Literal["function"]
    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: _Ignored = None


Modality = Literal["audio", "text"]


class RealtimeSessionConfig(Strict, kw_only=True):
    """The session that a client asks for, or the part of it that changes."""

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


# --- short-lived keys


class KeyLifetime(Strict):
    """Seconds for which a short-lived key is good, from the time at which it is made."""

    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, msgspec.Meta(ge=10, le=7200)] = 600


class ClientSecretRequest(Strict):
    """Body of the HTTP request for a short-lived key."""

    expires_after: KeyLifetime = msgspec.field(default_factory=KeyLifetime)
    session: RealtimeSessionConfig | None = None


# --- items of the conversation


class ContentPart(Strict, kw_only=True):
    """One part of a message item: text, sound or a picture (`image_url`, a data: URL)."""

    type: Literal["input_text", "input_audio", "input_image", "output_text", "output_audio", "text"]
    text: str | None = None
    audio: bytes | None = None
    transcript: str | None = None
    image_url: str | None = None
    detail: _Ignored = None


class MessageItem(Strict, tag_field="type", tag="message", kw_only=True):
    """Something that the user, the assistant or the system says."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[ContentPart], msgspec.Meta(max_length=64)]
    id: Name | None = None
    object: Name | None = None
    status: Name | None = None
    phase: _Ignored = None


class FunctionOutputItem(Strict, tag_field="type", tag="function_call_output", kw_only=True):
    """The result of a function that the model called."""

    call_id: Name
    output: str
    id: Name | None = None
    object: Name | None = None
    status: Name | None = None


class FunctionCallItem(Strict, tag_field="type", tag="function_call", kw_only=True):
    """A call of a function in a conversation before this session."""

    name: Name
    arguments: str
    call_id: Name | None = None
    id: Name | None = None
    object: Name | None = None
    status: Name | None = None


ConversationItem = MessageItem | FunctionOutputItem | FunctionCallItem


# --- messages


class RealtimeUpdate(Event, tag="session.update", kw_only=True):
    """Changes the session."""

    session: RealtimeSessionConfig


class AppendInput(Event, tag="input_audio_buffer.append", kw_only=True):
    """Sound of the user, in the session's input format."""

    audio: bytes


class CommitInput(Event, tag="input_audio_buffer.commit"):
    """Ends the user's turn."""


class ClearInput(Event, tag="input_audio_buffer.clear"):
    """Discards the user's sound that the model has not heard yet."""


class ItemCreate(Event, tag="conversation.item.create", kw_only=True):
    """Adds an item to the conversation."""

    item: ConversationItem
    previous_item_id: str | None = None


class ItemRetrieve(Event, tag="conversation.item.retrieve", kw_only=True):
    """Asks for an item of the conversation."""

    item_id: Name


class ItemDelete(Event, tag="conversation.item.delete", kw_only=True):
    """Deletes an item from the list of items. The model has heard or read the item already."""

    item_id: Name


class ItemTruncate(Event, tag="conversation.item.truncate", kw_only=True):
    """Says how much of an item the client has played."""

    item_id: Name
    content_index: int
    audio_end_ms: int


class ClearOutput(Event, tag="output_audio_buffer.clear"):
    """Stops what plays on the client's track."""


class ResponseConfig(Strict):
    """What a client asks of one response."""

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


class ResponseCreate(Event, tag="response.create", kw_only=True):
    """Asks for a response."""

    response: ResponseConfig | None = None


class ResponseCancel(Event, tag="response.cancel", kw_only=True):
    """Ends a response before the model does."""

    response_id: str | None = None


_SharedMessage = (
    RealtimeUpdate
    | CommitInput
    | ClearInput
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
)
WebSocketMessage = AppendInput | _SharedMessage
WebRtcMessage = ClearOutput | _SharedMessage
WEBSOCKET_MESSAGES = MessageTypes[WebSocketMessage](WebSocketMessage, unsupported=("output_audio_buffer.clear",))
WEBRTC_MESSAGES = MessageTypes[WebRtcMessage](WebRtcMessage, AppendInput)  # the client's sound comes on a track


def sound_format(format: AudioFormat) -> SoundFormat:
    """Returns the sound format that a client names."""
    kind = str(format.__struct_config__.tag).removeprefix("audio/")
    return SoundFormat(kind, 24_000 if kind == "pcm" else 8_000)
