"""The messages that a client of GPT-Live may send, as types. Every other message is refused with an error.

Fields and limits are those of OpenAI's Live API (the types in `openai.types.live` of the `openai` package). Three
messages are our own: `session.resume`, `session.input_text.append` and `session.input_image.append`. A field that is
declared with `no_effect` is accepted, and named in the field `no_effect` of the session that the server sends back.
`configuration` refuses what this server cannot give. Used by `protocol` and `routes`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from jaxtml.serve.protocols.messages import Binary, Event, MessageTypes, PictureFile, Strict, no_effect
from jaxtml.serve.transport.sound import SoundFormat

_OfItem = Annotated[Any, no_effect("nothing refers to a message of the history later")]

# --- the session


class LivePcm(Strict, kw_only=True, tag_field="type", tag="audio/pcm"):
    """Signed 16-bit little-endian samples, mono."""

    rate: Literal[16000, 24000]


class LivePcmu(Strict, tag_field="type", tag="audio/pcmu"):
    """G.711 mu-law, mono."""

    rate: Literal[8000] = 8000


class LivePcma(Strict, tag_field="type", tag="audio/pcma"):
    """G.711 A-law, mono."""

    rate: Literal[8000] = 8000


class LiveVoice(Strict):
    """The voice that the client asks for."""

    voice: Annotated[Any, no_effect("the model has one voice")] = None


class LiveAudio(Strict):
    """Sound format of both directions, and the voice."""

    format: LivePcm | LivePcmu | LivePcma | None = None
    output: LiveVoice | None = None


class Delegation(Strict, kw_only=True):
    """Who does the tasks that the model delegates (hands over, in words). Only `client` is supported."""

    type: Literal["client", "responses", "decisions"]
    acknowledgement_delay_ms: int | None = None
    responses: dict[str, Any] | None = None
    decisions: dict[str, Any] | None = None


class TextPart(Strict, kw_only=True):
    """The text of one message of the history."""

    text: str
    type: Literal["input_text", "text", "output_text"] | None = None


class HistoryItem(Strict, kw_only=True):
    """One message of a conversation before this session."""

    role: Literal["developer", "user", "assistant"]
    content: tuple[TextPart]
    id: _OfItem = None
    status: _OfItem = None
    type: Literal["message"] | None = None


class LiveSessionConfig(Strict, kw_only=True):
    """The session that a client asks for. `configuration.check` says what this server can give."""

    model: str
    audio: LiveAudio | None = None
    client: dict[str, Any] | None = None
    delegation: Delegation | None = None
    input: list[HistoryItem] | None = None
    instructions: str | None = None
    safety_identifier: Annotated[Any, no_effect("this server does not report its users to anyone")] = None
    store: bool | None = None
    triggers: list[dict[str, Any]] | None = None


class LiveSessionChange(Strict):
    """What a client may ask to change in a running session."""

    delegation: Delegation | None = None
    triggers: list[dict[str, Any]] | None = None


class WebRtcOffer(Strict, kw_only=True):
    """A client's WebRTC offer, in SDP."""

    type: Literal["webrtc"]
    sdp: str


class CreateSession(Strict, kw_only=True):
    """Body of the HTTP request for a session over WebRTC."""

    session: LiveSessionConfig
    transport: WebRtcOffer


# --- the first message over a WebSocket


class Start(Event, tag="session.start", kw_only=True):
    """Asks for a new session."""

    session: LiveSessionConfig


class Resume(Event, tag="session.resume", kw_only=True):
    """Continues a session (our own message).

    `after` is the `sequence_number` of the last event that the client has received.
    """

    session_id: str
    resume_token: str
    after: int


# --- messages of a running session


class LiveUpdate(Event, tag="session.update", kw_only=True):
    """Changes the session."""

    session: LiveSessionChange


class AppendAudio(Event, tag="session.input_audio.append", kw_only=True):
    """Sound of the user, in the session's format."""

    audio: Binary


class Mute(Event, tag="session.input_audio.mute"):
    """From now on the model hears silence."""


class Unmute(Event, tag="session.input_audio.unmute"):
    """From now on the model hears the user again."""


class _Context(Event, kw_only=True):
    """Text for the model that the user did not say or type. The model reads it as background text.

    `delegation_id` names the delegation that the text answers. The field is required, but may be null.
    """

    content: str
    delegation_id: str | None


class AppendInstructions(_Context, tag="session.instructions.append"):
    """Tells the model how to behave."""


class AppendThinking(_Context, tag="session.thinking.append"):
    """Gives the model a thought, for example one from a program that works on a delegated task."""


class AppendCommentary(_Context, tag="session.commentary.append"):
    """Gives the model information, such as the answer to a delegation."""


class AppendText(Event, tag="session.input_text.append", kw_only=True):
    """Text that the user types (our own message)."""

    content: str


class AppendImage(Event, tag="session.input_image.append", kw_only=True):
    """What the user's camera sees now: JPEG or PNG, in base64 or as a data: URL (our own message)."""

    image: PictureFile


class Close(Event, tag="session.close"):
    """Ends the session when the model has finished speaking."""


Context = AppendInstructions | AppendThinking | AppendCommentary
FirstMessage = Start | Resume
SoundlessMessage = LiveUpdate | Mute | Unmute | Context | AppendText | AppendImage | Close
SessionMessage = AppendAudio | SoundlessMessage
# Messages of OpenAI's Live API that this server does not support, for example because it has no background model.
_UNSUPPORTED = (
    "session.output_audio.fixture.play",
    "response.item.create",
    "response.create",
    "decision.create",
    "decision.item.create",
    "decision.item.delete",
    "transport.dtmf.send",
    "session.fork",
)
FIRST_MESSAGES = MessageTypes[FirstMessage](FirstMessage, SessionMessage, _UNSUPPORTED)
SESSION_MESSAGES = MessageTypes[SessionMessage](SessionMessage, FirstMessage, _UNSUPPORTED)
# For senders that send no sound in messages: sidebands, and clients whose sound comes on a track.
SOUNDLESS_MESSAGES = MessageTypes[SoundlessMessage](SoundlessMessage, FirstMessage | AppendAudio, _UNSUPPORTED)


def sound_format(audio: LiveAudio | None) -> SoundFormat:
    """Returns the sound format that a session asks for: 24 kHz PCM unless it names another one."""
    chosen = audio.format if audio and audio.format else LivePcm(rate=24000)
    return SoundFormat(str(chosen.__struct_config__.tag).removeprefix("audio/"), chosen.rate)
