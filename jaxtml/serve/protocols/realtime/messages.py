"""The messages that a client of OpenAI's Realtime API may send, as types (`openai.types.realtime` of `openai`).

A field that is declared with `no_effect` is accepted, because the API's clients send it as a matter of course. The
server names it in the field `no_effect` of the session, the response or the item that it sends back. Other fields that
this server does not support matter to the client that sets them. `configuration` refuses these with an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from jaxtml.serve.protocols.messages import Binary, Event, MessageTypes, Name, Strict, no_effect
from jaxtml.serve.transport.sound import SoundFormat

# Types of fields that have no effect, by the reason.
_OfDetector = Annotated[Any, no_effect("there is no detector of turns: the model decides when it speaks")]
_OfTranscriber = Annotated[
    dict[str, Any] | None | msgspec.UnsetType, no_effect("the model itself writes what it hears, in its own way")
]
_OfSound = Annotated[Any, no_effect("the model hears the sound as it comes")]
_OfVoice = Annotated[Any, no_effect("the model has one voice")]
_OfSpeed = Annotated[Any, no_effect("the model speaks at its own speed")]
_OfReasoning = Annotated[Any, no_effect("the model does not reason in steps")]
_OfTracing = Annotated[Any, no_effect("the operator of this server decides what is traced")]
_OfTruncation = Annotated[Any, no_effect("the model forgets the oldest part of a long conversation by itself")]
_OfTool = Annotated[Any, no_effect("arguments are not checked against their schema")]
_OfPicture = Annotated[Any, no_effect("every picture is scaled to the size that the model takes")]
_OfItem = Annotated[Any, no_effect("the server itself decides this field of an item")]

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
    interrupt_response: _OfDetector = None
    threshold: _OfDetector = None
    prefix_padding_ms: _OfDetector = None
    silence_duration_ms: _OfDetector = None
    idle_timeout_ms: _OfDetector = None
    eagerness: _OfDetector = None


class AudioInput(Strict):
    """Sound of the user. A field that is absent stays as it is.

    `turn_detection: null` switches the detection off, and `transcription: null` the events with the transcript.
    """

    format: AudioFormat | None | msgspec.UnsetType = msgspec.UNSET
    turn_detection: TurnDetection | None | msgspec.UnsetType = msgspec.UNSET
    transcription: _OfTranscriber = msgspec.UNSET
    noise_reduction: _OfSound = msgspec.UNSET


class AudioOutput(Strict):
    """Sound of the model."""

    format: AudioFormat | None | msgspec.UnsetType = msgspec.UNSET
    voice: _OfVoice = None
    speed: _OfSpeed = None


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
    strict: _OfTool = None


class NamedTool(Strict, kw_only=True):
    """Asks for a call of one function. Always refused: nobody can make the model call a function."""

    type: Literal["function", "mcp"]
    name: str | None = None
    server_label: str | None = None


# One of the two, as in the API: "audio" (with a transcript) or "text".
Modalities = Annotated[list[Literal["audio", "text"]], msgspec.Meta(min_length=1, max_length=1)]
ToolChoice = Literal["auto", "none", "required"] | NamedTool
MaxTokens = Annotated[int, msgspec.Meta(ge=1, le=4096)] | Literal["inf"]


class RealtimeSessionConfig(Strict, kw_only=True):
    """The session that a client asks for, or the part of it that changes."""

    type: Literal["realtime"]
    model: str | None = None
    audio: RealtimeAudio | None = None
    instructions: str | None = None
    output_modalities: Modalities | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    max_output_tokens: MaxTokens | None = None
    prompt: dict[str, Any] | None = None
    reasoning: _OfReasoning = None
    tracing: _OfTracing = msgspec.UNSET
    truncation: _OfTruncation = None


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
    audio: Binary | None = None
    transcript: str | None = None
    image_url: str | None = None
    detail: _OfPicture = None


class MessageItem(Strict, tag_field="type", tag="message", kw_only=True):
    """Something that the user, the assistant or the system says."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[ContentPart], msgspec.Meta(max_length=64)]
    id: Name | None = None
    object: _OfItem = None
    status: _OfItem = None
    phase: _OfItem = None


class FunctionOutputItem(Strict, tag_field="type", tag="function_call_output", kw_only=True):
    """The result of a function that the model called."""

    call_id: Name
    output: str
    id: Name | None = None
    object: _OfItem = None
    status: _OfItem = None


class FunctionCallItem(Strict, tag_field="type", tag="function_call", kw_only=True):
    """A call of a function in a conversation before this session."""

    name: Name
    arguments: str
    call_id: Name | None = None
    id: Name | None = None
    object: _OfItem = None
    status: _OfItem = None


ConversationItem = MessageItem | FunctionOutputItem | FunctionCallItem


# --- messages


class RealtimeUpdate(Event, tag="session.update", kw_only=True):
    """Changes the session."""

    session: RealtimeSessionConfig


class AppendInput(Event, tag="input_audio_buffer.append", kw_only=True):
    """Sound of the user, in the session's input format."""

    audio: Binary


class CommitInput(Event, tag="input_audio_buffer.commit"):
    """Ends the user's turn."""


class ClearInput(Event, tag="input_audio_buffer.clear"):
    """Discards the user's sound that the model has not heard yet."""


class ItemCreate(Event, tag="conversation.item.create", kw_only=True):
    """Adds an item to the conversation, at its end or after the item `previous_item_id` ("root": as the first item)."""

    item: ConversationItem
    previous_item_id: Name | None = None


class ItemRetrieve(Event, tag="conversation.item.retrieve", kw_only=True):
    """Asks for an item of the conversation."""

    item_id: Name


class ItemDelete(Event, tag="conversation.item.delete", kw_only=True):
    """Deletes an item from the list of items. The model has heard or read the item already."""

    item_id: Name


class ItemTruncate(Event, tag="conversation.item.truncate", kw_only=True):
    """Cuts the sound of one of the model's items to what the client has played."""

    item_id: Name
    content_index: int
    audio_end_ms: int


class ClearOutput(Event, tag="output_audio_buffer.clear"):
    """Stops what plays on the client's track."""


class ResponseAudio(Strict):
    """Sound of one response."""

    output: AudioOutput | None = None


class ResponseConfig(Strict):
    """What a client asks of one response. `SessionConfiguration.check_response` says what this server can give."""

    metadata: Annotated[dict[Name, Name], msgspec.Meta(max_length=16)] | None = None
    instructions: str | None = None
    output_modalities: Modalities | None = None
    audio: ResponseAudio | None = None
    conversation: str | None = None
    input: list[Any] | None = None
    max_output_tokens: MaxTokens | None = None
    parallel_tool_calls: bool | None = None
    prompt: dict[str, Any] | None = None
    reasoning: _OfReasoning = None
    tool_choice: ToolChoice | None = None
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
