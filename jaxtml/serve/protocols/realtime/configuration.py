"""The configuration of one session of the Realtime API, as its client has changed it so far."""

from __future__ import annotations

from typing import Any

import msgspec

from jaxtml.serve.protocols.realtime.messages import (
    AudioFormat,
    AudioInput,
    AudioOutput,
    RealtimePcm,
    RealtimeSessionConfig,
    Tool,
    TurnDetection,
    sound_format,
)
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
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

    Attributes:
      turn_detection: None: the client itself says when turns end and when it wants a response.
      modality: "audio" (with a transcript) or "text": what a response has.
      instructions: the last instructions.
      tools: functions of the client that the model may call.
      encoder: encodes the model's sound for the client.
      formats_fixed: there has been sound, so its formats cannot change any more.
    """

    def __init__(self, session: ClientSession, model: ServedModel, intake: Intake):
        self.session, self.model, self.intake = session, model, intake
        self.turn_detection: TurnDetection | None = TurnDetection(type="server_vad")
        self.modality: str = "audio"
        self.instructions = ""
        self.tools: list[Tool] = []
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
        if change.model is not None and not self.model.is_called(change.model):
            raise InvalidMessage("model_not_found", self.model.refuse(change.model), "session.model")
        audio_input = change.audio.input if change.audio and change.audio.input else AudioInput()
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
        discard = formats_change
        if not isinstance(audio_input.turn_detection, msgspec.UnsetType):
            self.turn_detection, discard = audio_input.turn_detection, True
        if formats_change:
            self._input_format, self._output_format = input_format, output_format
            self.intake.decoder = SoundDecoder(sound_format(input_format))
            self.encoder = SoundEncoder(sound_format(output_format))
        return discard

    def _tell_model(self, change: RealtimeSessionConfig) -> None:
        """Gives new instructions and tools to the model, as background text. Raises `InvalidMessage`."""
        instructions = self.instructions if change.instructions is None else change.instructions
        tools = self.tools if change.tools is None else change.tools
        text = "" if instructions == self.instructions else instructions
        if tools != self.tools:
            text += "\n" + dumps([msgspec.to_builtins(tool) for tool in tools])
        if text.strip():
            self.intake.queue_text(Control.BACKGROUND, text, "session.instructions", INSTRUCTIONS_TOKENS)
        self.instructions, self.tools = instructions, tools

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
            "tool_choice": "auto",
            "audio": {
                "input": {"format": _format_resource(self._input_format), "turn_detection": detection},
                "output": {"format": _format_resource(self._output_format), "voice": "own"},
            },
        }


def _format_resource(format: AudioFormat) -> dict[str, Any]:
    sound = sound_format(format)
    return {"type": f"audio/{sound.kind}"} | ({"rate": sound.rate} if sound.kind == "pcm" else {})
