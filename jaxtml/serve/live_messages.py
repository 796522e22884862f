"""What a client of GPT-Live may say, as types: whatever else it says is refused with the name of what is wrong.

Fields and limits are those of OpenAI's Live API (types of the `openai` package, `openai.types.live`), and ours:
`session.resume`, `session.input_text.append`, `session.input_image.append`. Base64 comes as bytes.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar, get_args

import msgspec

from jaxtml.serve.sound import Format


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    pass


class Pcm(_Strict, kw_only=True, tag_field="type", tag="audio/pcm"):
    rate: Literal[16000, 24000]


class Pcmu(_Strict, tag_field="type", tag="audio/pcmu"):
    rate: Literal[8000] = 8000


class Pcma(_Strict, tag_field="type", tag="audio/pcma"):
    rate: Literal[8000] = 8000


class Voice(_Strict):
    voice: str | dict[str, str] | None = None


class Audio(_Strict):
    format: Pcm | Pcmu | Pcma | None = None
    output: Voice | None = None


class Delegation(_Strict, kw_only=True):
    type: Literal["client", "responses", "decisions"]
    acknowledgement_delay_ms: int | None = None
    responses: dict[str, Any] | None = None
    decisions: dict[str, Any] | None = None


class Part(_Strict, kw_only=True):
    text: str
    type: Literal["input_text", "text", "output_text"] | None = None


class Item(_Strict, kw_only=True):
    role: Literal["developer", "user", "assistant"]
    content: tuple[Part]
    id: str | None = None
    status: Literal["incomplete", "completed"] | None = None
    type: Literal["message"] | None = None


class SessionConfig(_Strict, kw_only=True):
    model: str
    audio: Audio | None = None
    client: dict[str, Any] | None = None
    delegation: Delegation | None = None
    input: list[Item] | None = None
    instructions: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    triggers: list[dict[str, Any]] | None = None


class UpdateConfig(_Strict):
    delegation: Delegation | None = None
    triggers: list[dict[str, Any]] | None = None


class Event(_Strict, tag_field="type", kw_only=True):
    event_id: str | None = None


class Start(Event, tag="session.start", kw_only=True):
    session: SessionConfig


class Resume(Event, tag="session.resume", kw_only=True):
    """Ours. `after`: the `sequence_number` of the last event that was received."""

    session_id: str
    resume_token: str
    after: int


class Update(Event, tag="session.update", kw_only=True):
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
Later = Update | AppendAudio | Mute | Unmute | Context | AppendText | AppendImage | Close
FIRST: msgspec.json.Decoder[First] = msgspec.json.Decoder(First)
LATER: msgspec.json.Decoder[Later] = msgspec.json.Decoder(Later)
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
_KNOWN = sorted(str(kind.__struct_config__.tag) for union in (First, Later) for kind in get_args(union))
_Message = TypeVar("_Message")


class Invalid(Exception):
    """A message that cannot be taken, in the words of the protocol's error."""

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None):
        super().__init__(message)
        self.code, self.param, self.event_id = code, param, event_id


class _Named(msgspec.Struct):
    type: Any = None
    event_id: Any = None


def decoded(decoder: msgspec.json.Decoder[_Message], data: bytes) -> _Message:
    """Raises `Invalid`, with the client's `event_id` where there is one."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(error, data) from error


def format_of(audio: Audio | None) -> Format:
    """24 kHz PCM where nothing is said."""
    given = audio.format if audio and audio.format else Pcm(rate=24000)
    return Format(str(given.__struct_config__.tag).removeprefix("audio/"), given.rate)


def _invalid(error: Exception, data: bytes) -> Invalid:
    try:
        named = msgspec.json.decode(data, type=_Named)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Invalid("invalid_json", f"a message is one JSON object, in UTF-8: {error}"[:300])
    event_id = named.event_id if isinstance(named.event_id, str) else None
    if named.type in _UNSUPPORTED:
        return Invalid("unsupported_event", f"this server does not know what to do with {named.type}", "type", event_id)
    text = str(error)
    where = re.search(r"`\$\.?([^`]*)`", text)
    param = where[1] if where else None
    if unknown := re.search(r"unknown field `([^`]*)`", text):
        param = f"{param}.{unknown[1]}" if param else unknown[1]
        return Invalid("unknown_parameter", f"there is no parameter {param}"[:300], param[:100], event_id)
    if missing := re.search(r"missing required field `([^`]*)`", text):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return Invalid("missing_required_parameter", f"{param} is missing", param, event_id)
    if named.type in _KNOWN and param == "type":
        return Invalid("invalid_event_order", f"{named.type} has no place here", "type", event_id)
    if param == "type":
        return Invalid("invalid_event_type", f"type is one of {', '.join(_KNOWN)}", param, event_id)
    return Invalid("invalid_value", text[:300], param, event_id)
