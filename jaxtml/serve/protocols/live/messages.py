"""What a client of GPT-Live may say, as types: whatever else it says is refused with the name of what is wrong.

Fields and limits are those of OpenAI's Live API (types of the `openai` package, `openai.types.live`), and ours:
`session.resume`, `session.input_text.append`, `session.input_image.append`. Base64 comes as bytes.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtml.serve.protocols.messages import Event, MessageTypes, Strict
from jaxtml.serve.transport.sound import SoundFormat


class Pcm(Strict, kw_only=True, tag_field="type", tag="audio/pcm"):
    rate: Literal[16000, 24000]


class Pcmu(Strict, tag_field="type", tag="audio/pcmu"):
    rate: Literal[8000] = 8000


class Pcma(Strict, tag_field="type", tag="audio/pcma"):
    rate: Literal[8000] = 8000


class LiveVoice(Strict):
    voice: str | dict[str, str] | None = None


class LiveAudio(Strict):
    format: Pcm | Pcmu | Pcma | None = None
    output: LiveVoice | None = None


class Delegation(Strict, kw_only=True):
    type: Literal["client", "responses", "decisions"]
    acknowledgement_delay_ms: int | None = None
    responses: dict[str, Any] | None = None
    decisions: dict[str, Any] | None = None


class Part(Strict, kw_only=True):
    text: str
    type: Literal["input_text", "text", "output_text"] | None = None


class HistoryItem(Strict, kw_only=True):
    role: Literal["developer", "user", "assistant"]
    content: tuple[Part]
    id: str | None = None
    status: Literal["incomplete", "completed"] | None = None
    type: Literal["message"] | None = None


class LiveSessionConfig(Strict, kw_only=True):
    model: str
    audio: LiveAudio | None = None
    client: dict[str, Any] | None = None
    delegation: Delegation | None = None
    input: list[HistoryItem] | None = None
    instructions: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    triggers: list[dict[str, Any]] | None = None


class UpdateConfig(Strict):
    delegation: Delegation | None = None
    triggers: list[dict[str, Any]] | None = None


class Start(Event, tag="session.start", kw_only=True):
    session: LiveSessionConfig


class Resume(Event, tag="session.resume", kw_only=True):
    """Ours. `after`: the `sequence_number` of the last event that was received."""

    session_id: str
    resume_token: str
    after: int


class Offer(Strict, kw_only=True):
    """Of a peer: where and how it may be reached."""

    type: Literal["webrtc"]
    sdp: str


class Create(Strict, kw_only=True):
    """The body of a request for a session with a peer."""

    session: LiveSessionConfig
    transport: Offer


class LiveUpdate(Event, tag="session.update", kw_only=True):
    session: UpdateConfig


class AppendAudio(Event, tag="session.input_audio.append", kw_only=True):
    audio: bytes


class Mute(Event, tag="session.input_audio.mute"):
    pass


class Unmute(Event, tag="session.input_audio.unmute"):
    pass


class _Context(Event, kw_only=True):
    content: str
    delegation_id: str | None  # required, may be null


class AppendInstructions(_Context, tag="session.instructions.append"):
    pass


class AppendThinking(_Context, tag="session.thinking.append"):
    pass


class AppendCommentary(_Context, tag="session.commentary.append"):
    pass


class AppendText(Event, tag="session.input_text.append", kw_only=True):
    """Ours: what the user types."""

    content: str


class AppendImage(Event, tag="session.input_image.append", kw_only=True):
    """Ours: what the camera sees now, as JPEG or PNG."""

    image: bytes


class Close(Event, tag="session.close"):
    pass


Context = AppendInstructions | AppendThinking | AppendCommentary
First = Start | Resume
Beside = LiveUpdate | Mute | Unmute | Context | AppendText | AppendImage | Close
Later = AppendAudio | Beside
# Of OpenAI's vocabulary, what needs a background model, a recording or decisions of the server's own.
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
FIRST = MessageTypes[First](First, Later, _UNSUPPORTED)
LATER = MessageTypes[Later](Later, First, _UNSUPPORTED)
BESIDE = MessageTypes[Beside](Beside, First | AppendAudio, _UNSUPPORTED)  # of a sideband


def format_of(audio: LiveAudio | None) -> SoundFormat:
    """24 kHz PCM where nothing is said."""
    given = audio.format if audio and audio.format else Pcm(rate=24000)
    return SoundFormat(str(given.__struct_config__.tag).removeprefix("audio/"), given.rate)
