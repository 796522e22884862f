"""The configuration of one session of the Realtime API, as its client has changed it so far."""

from __future__ import annotations

from typing import Any

import msgspec

from jaxtml.serve.protocols.messages import fields_without_effect
from jaxtml.serve.protocols.realtime.messages import (
    AudioFormat,
    AudioInput,
    AudioOutput,
    MaxTokens,
    RealtimePcm,
    RealtimeSessionConfig,
    ResponseConfig,
    Tool,
    TurnDetection,
    sound_format,
)
from jaxtml.serve.sessions.client_session import BACKGROUND_UNREAD, ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake, check_length
from jaxtml.serve.transport.sound import SoundDecoder, SoundEncoder
from jaxtml.stream.tokens import Control
from jaxtml.strict_json import dumps

INSTRUCTIONS_TOKENS = 16_384  # of the instructions of a session or a response
DEFAULT_FORMAT: AudioFormat = RealtimePcm(rate=24_000)


class SessionConfiguration:
    """What the client of one session has configured.

    Args:
      session: the session.
      model: the model that is served.
      intake: takes the instructions, and decodes the client's sound.
      on_track: sound comes and goes on the tracks of a WebRTC connection, in the tracks' own format.

    Attributes:
      turn_detection: None: the client itself says when turns end and when it wants a response.
      modality: "audio" (with a transcript) or "text": what a response has.
      instructions: the last instructions.
      tools: functions of the client that the model may call.
      tool_choice: "auto", or "none": a delegation calls no function.
      parallel_tool_calls: whether one response may have several function calls.
      max_output_tokens: the most tokens of one response; "inf": there is no limit.
      transcribes: whether the client gets the transcript of the user's turns.
      no_effect: fields that the client has set and that have no effect, by path, with the reason.
      encoder: encodes the model's sound for the client.
      formats_fixed: there has been sound, so its formats cannot change any more.
    """

    def __init__(self, session: ClientSession, model: ServedModel, intake: Intake, on_track: bool):
        self.session, self.model, self.intake, self.on_track = session, model, intake, on_track
        self.turn_detection: TurnDetection | None = TurnDetection(type="server_vad")
        self.modality: str = "audio"
        self.instructions = ""
        self.tools: list[Tool] = []
        self.tool_choice: str = "auto"
        self.parallel_tool_calls = True
        self.max_output_tokens: MaxTokens = "inf"
        self.transcribes = True
        self.no_effect: dict[str, str] = {}
        self.encoder = SoundEncoder(sound_format(DEFAULT_FORMAT))
        self.formats_fixed = False
        self._input_format, self._output_format = DEFAULT_FORMAT, DEFAULT_FORMAT

    @property
    def responds_by_itself(self) -> bool:
        """Whether a response begins when the model begins to speak. If not, only `response.create` begins responses."""
        return self.turn_detection is not None and self.turn_detection.create_response is not False

    def apply(self, change: RealtimeSessionConfig) -> bool:
        """Applies a change: all of it, or nothing if an error is raised.

        Returns:
          Whether speech that is kept for a later response must be dropped: turn detection or formats have changed.

        Raises:
          InvalidMessage: what is wrong with the change.
        """
        check_session(change, self.model)
        audio_input = _input_of(change)
        audio_output = change.audio.output if change.audio and change.audio.output else AudioOutput()
        input_format = audio_input.format or self._input_format
        output_format = audio_output.format or self._output_format
        formats_change = (sound_format(input_format), sound_format(output_format)) != (
            sound_format(self._input_format),
            sound_format(self._output_format),
        )
        if formats_change and self.formats_fixed:
            text = "the format of sound cannot change after there has been sound"
            raise InvalidMessage("invalid_value", text, "session.audio")
        self._tell_model(change)
        if change.output_modalities:
            self.modality = change.output_modalities[0]
        if change.tool_choice is not None:
            self.tool_choice = str(change.tool_choice)
        if change.parallel_tool_calls is not None:
            self.parallel_tool_calls = change.parallel_tool_calls
        if change.max_output_tokens is not None:
            self.max_output_tokens = change.max_output_tokens
        if not isinstance(audio_input.transcription, msgspec.UnsetType):
            self.transcribes = audio_input.transcription is not None
        discard = formats_change
        detection = audio_input.turn_detection
        if not isinstance(detection, msgspec.UnsetType):
            # Without the fields that have no effect, which may be large.
            self.turn_detection = detection and TurnDetection(
                type=detection.type, create_response=detection.create_response
            )
            discard = True
        if formats_change:
            self._input_format, self._output_format = input_format, output_format
            self.intake.decoder = SoundDecoder(sound_format(input_format))
            self.encoder = SoundEncoder(sound_format(output_format))
        return discard

    def _tell_model(self, change: RealtimeSessionConfig) -> None:
        """Gives new instructions and tools to the model, as background text, if the model reads such text.

        Raises:
          InvalidMessage: the text is too long, or the session has no room for it now.
        """
        instructions = self.instructions if change.instructions is None else change.instructions
        tools = self.tools if change.tools is None else change.tools
        text = "" if instructions == self.instructions else instructions
        if tools != self.tools:
            text += "\n" + tools_text(tools)
        if text.strip() and self.model.reads_background:
            self.intake.queue_text(Control.BACKGROUND, text, "session.instructions", INSTRUCTIONS_TOKENS)
        self.instructions, self.tools = instructions, tools
        self._note_no_effect(change)

    def _note_no_effect(self, change: RealtimeSessionConfig) -> None:
        """Notes which fields of the session have no effect after a change.

        A field that the change does not mention stays noted. A change that sets a field of `replaced` replaces that
        field as a whole, and everything that was noted of that field before is forgotten. Null sets a field too, but
        `tools: null` changes nothing.
        """
        audio_input = _input_of(change)
        replaced = {
            "tools": msgspec.UNSET if change.tools is None else change.tools,
            "audio.input.turn_detection": audio_input.turn_detection,
            "audio.input.transcription": audio_input.transcription,
            "audio.input.noise_reduction": audio_input.noise_reduction,
            "tracing": change.tracing,
        }
        stale = ("instructions", *(path for path, value in replaced.items() if value is not msgspec.UNSET))
        kept = {path: reason for path, reason in self.no_effect.items() if not path.startswith(stale)}
        self.no_effect = kept | fields_without_effect(change)
        for direction in ("input", "output") if self.on_track and change.audio is not None else ():
            if getattr(getattr(change.audio, direction), "format", None):
                self.no_effect[f"audio.{direction}.format"] = "WebRTC decides the format of sound itself"
        if not self.model.reads_background:
            unread = {"instructions": self.instructions, "tools": self.tools}
            self.no_effect |= {name: BACKGROUND_UNREAD for name, value in unread.items() if value}

    def check_response(self, config: ResponseConfig) -> None:
        """Checks that this server can give a client the response that it asks for.

        Raises:
          InvalidMessage: the server cannot; names the field.
        """
        if config.conversation == "none":
            text = "this server has no responses outside the conversation: the model is always in it"
            raise InvalidMessage("unsupported_value", text, "response.conversation")
        if config.conversation not in (None, "auto"):
            raise InvalidMessage("invalid_value", 'this must be "auto" or "none"', "response.conversation")
        if config.input is not None:
            text = "this server does not support response.input: a response answers the conversation"
            raise InvalidMessage("unsupported_parameter", text, "response.input")
        if config.instructions and not self.model.reads_background:
            raise InvalidMessage("unsupported_parameter", BACKGROUND_UNREAD, "response.instructions")
        check_supported(config, "response")
        output = config.audio.output if config.audio is not None else None
        format = None if output is None or isinstance(output.format, msgspec.UnsetType) else output.format
        if format is not None and sound_format(format) != sound_format(self._output_format):
            text = "a response has the sound format of its session"
            raise InvalidMessage("unsupported_value", text, "response.audio.output.format")

    def resource(self) -> dict[str, Any]:
        """Returns the session as it is, as events show it."""
        detection = None
        if self.turn_detection is not None:
            detection = {
                "type": self.turn_detection.type,
                "create_response": self.responds_by_itself,
                "interrupt_response": True,
            }
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.session.id,
            "model": self.model.name,
            "expires_at": int(self.session.expires_at),
            "output_modalities": [self.modality],
            "instructions": self.instructions,
            "tools": [msgspec.to_builtins(tool) for tool in self.tools],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_output_tokens": self.max_output_tokens,
            "audio": {
                "input": {
                    "format": _format_resource(self._input_format),
                    "transcription": {"model": self.model.name} if self.transcribes else None,
                    "turn_detection": detection,
                },
                "output": {"format": _format_resource(self._output_format), "voice": "own"},
            },
        } | ({"no_effect": self.no_effect} if self.no_effect else {})


def check_session(config: RealtimeSessionConfig, model: ServedModel) -> None:
    """Checks that this server can give a client the session that it asks for.

    Raises:
      InvalidMessage: the server cannot; names the field.
    """
    if config.model is not None and not model.is_called(config.model):
        raise InvalidMessage("model_not_found", model.refuse(config.model), "session.model")
    check_supported(config, "session")
    if config.include:
        raise InvalidMessage("unsupported_parameter", "this server does not support session.include", "session.include")
    check_length(model, config.instructions or "", INSTRUCTIONS_TOKENS, "session.instructions")
    check_length(model, tools_text(config.tools or []), INSTRUCTIONS_TOKENS, "session.tools")


def check_supported(config: RealtimeSessionConfig | ResponseConfig, path: str) -> None:
    """Checks the fields that a session and a response share.

    Args:
      config: the configuration of a session or a response.
      path: "session" or "response".

    Raises:
      InvalidMessage: this server cannot give what a field asks for; names the field.
    """
    if config.prompt is not None:
        raise InvalidMessage("unsupported_parameter", "this server stores no prompts", f"{path}.prompt")
    if config.tool_choice not in (None, "auto", "none"):
        text = 'nobody can make the model call a function: the choice is "auto" or "none"'
        raise InvalidMessage("unsupported_value", text, f"{path}.tool_choice")


def tools_text(tools: list[Tool]) -> str:
    """Returns a list of tools as the model reads it."""
    return dumps([msgspec.to_builtins(tool) for tool in tools])


def _input_of(change: RealtimeSessionConfig) -> AudioInput:
    """Returns what a change says of the user's sound; without fields if it says nothing."""
    return change.audio.input if change.audio and change.audio.input else AudioInput()


def _format_resource(format: AudioFormat) -> dict[str, Any]:
    sound = sound_format(format)
    return {"type": f"audio/{sound.kind}"} | ({"rate": sound.rate} if sound.kind == "pcm" else {})
