"""The responses of one session: when a response begins and ends, and what it gets of the model's output.

The docstring of `protocol` has the rules. Called by `protocol`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import numpy as np

from jaxtml.serve.protocols.messages import fields_without_effect
from jaxtml.serve.protocols.realtime.configuration import INSTRUCTIONS_TOKENS, SessionConfiguration, tools_text
from jaxtml.serve.protocols.realtime.conversation import RealtimeConversation
from jaxtml.serve.protocols.realtime.events import EventWriter
from jaxtml.serve.protocols.realtime.function_calls import function_call
from jaxtml.serve.protocols.realtime.messages import ResponseConfig
from jaxtml.serve.protocols.realtime.response import Response, ResponseSettings
from jaxtml.serve.protocols.realtime.user_turn import UserTurns
from jaxtml.serve.runtime.scheduler import TickResult
from jaxtml.serve.sessions.client_session import BACKGROUND_UNREAD, ClientSession
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.transport.sound import VoiceTrack
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control

_SILENT_MICRO_TURNS = 2  # this many micro-turns of silence end a response
# A response without speech is given up after this many micro-turns. Speech is kept for a later response for at most
# this many micro-turns.
_PATIENCE_MICRO_TURNS = 50


class _Speech(NamedTuple):
    """What the model said in one micro-turn, for a response that the client may still ask for.

    Attributes:
      text: words; may be empty.
      sound: the voice, in the client's format; None: the client has it on a track.
      tokens: number of tokens that the model generated for it.
    """

    text: str
    sound: bytes | None
    tokens: int


class Responses:
    """The responses of one session, one at a time.

    Args:
      session: the session.
      intake: takes the instructions of a response, and knows how much sound waits.
      events: writes the events.
      configuration: the session's configuration.
      conversation: takes the items of responses.
      user_turns: the user's turns, which responses end.
      track: takes the model's voice; None: the voice goes into events.

    Attributes:
      current: the response in progress; None: there is none.
    """

    def __init__(
        self,
        session: ClientSession,
        intake: Intake,
        events: EventWriter,
        configuration: SessionConfiguration,
        conversation: RealtimeConversation,
        user_turns: UserTurns,
        track: VoiceTrack | None,
    ):
        self.session, self.intake, self.events, self.track = session, intake, events, track
        self.configuration, self.conversation, self.user_turns = configuration, conversation, user_turns
        self.current: Response | None = None
        self._on_track: str | None = None  # id of the response that plays on the track
        self._silent = 0  # micro-turns for which the model has been silent
        self._deadline = 0  # number of the micro-turn at which an empty response is given up
        self._dropping = False  # a response was cancelled: drop what the model still says, until the gate closes
        # What the model said without being asked for a response.
        self._kept: deque[_Speech] = deque(maxlen=_PATIENCE_MICRO_TURNS)

    @property
    def speaking(self) -> bool:
        """Whether the response in progress has begun to speak."""
        return self.current is not None and self.current.message is not None

    # --- what the model does

    def on_micro_turn(self, result: TickResult, text: str) -> None:
        """Passes on the model's output of one micro-turn.

        Args:
          result: sound and gate of the micro-turn.
          text: words that the model said.
        """
        sound = self.configuration.encoder.encode(result.wave) if self.track is None else None
        speaks = result.speaking or bool(text)
        self._dropping = self._dropping and speaks
        speech = _Speech(text, sound, len(result.tokens) if speaks else 0)
        response = self._response_for(speech, speaks)
        audible = response is not None and self._extend_response(response, result, speech, speaks)
        if self.track is not None:
            self.track.put(result.wave if audible else np.zeros_like(result.wave))

    def call_function(self, task: str) -> None:
        """Turns a delegation into a call of one of the client's functions.

        The call is part of the current response, or of a new response if there is none. The response ends with the call
        if the model has not spoken in it, or if the response may have only one call. Without functions the delegation
        is dropped, because nobody could answer it. The delegation is also dropped if the client wants no calls.
        """
        settings = self._settings(None) if self.current is None else self.current.settings
        if not settings.tools or settings.tool_choice == "none":
            return
        alone = not self.speaking or not settings.parallel_tool_calls
        if self.current is None:
            self.current = self._begin(None)
        call_id = self.current.add_function_call(*function_call(task, settings.tools))
        self.conversation.expect_result(call_id, time.monotonic())
        self.session.span.add_event("delegation", {"id": call_id})
        if alone:
            self.end()

    def _response_for(self, speech: _Speech, speaks: bool) -> Response | None:
        """Returns the response that takes the output of this micro-turn. Begins a response if the gate opens one."""
        if self.current is None:
            if not self.configuration.responds_by_itself:
                self._keep_speech(speech, speaks)
                return None
            if not speaks or self._dropping:
                return None
            self.user_turns.end_for_answer()
            self.current = self._begin(None)
        return self.current

    def _extend_response(self, response: Response, result: TickResult, speech: _Speech, speaks: bool) -> bool:
        """Adds one micro-turn to a response, and ends the response if it is over.

        Returns:
          Whether the client hears the micro-turn.
        """
        if speaks and response.message is None:
            self.user_turns.end_for_answer()
        self._silent = 0 if speaks else self._silent + 1
        if speaks or response.message is not None:
            response.add_speech(speech.text, speech.sound, speech.tokens)
        has_speech = response.message is not None
        audible = has_speech and response.modality == "audio"
        if audible and self.track is not None and self._on_track is None:
            self._on_track = response.id
            self.events.send("output_audio_buffer.started", response_id=response.id)
        over = self._silent >= _SILENT_MICRO_TURNS if has_speech else result.number + 1 >= self._deadline
        if response.is_full:
            self._dropping = speaks
            self.end("incomplete", "max_output_tokens")
        elif over and self.user_turns.interrupts(result):
            self.end("cancelled", "turn_detected")
        elif over:
            self.end()
        return audible

    def _keep_speech(self, speech: _Speech, speaks: bool) -> None:
        """Keeps speech for a `response.create` that may follow.

        Nothing is kept for a track: a track plays only what is said now.
        """
        if speaks:
            self.drop_stale_speech()  # if the kept stretch of speech is over, a new one begins here
        self._silent = 0 if speaks else self._silent + 1
        for_track = self.track is not None and self.configuration.modality == "audio"
        if self._silent > _PATIENCE_MICRO_TURNS or for_track:
            self._kept.clear()
        elif not self._dropping and (speaks or self._kept and self._silent <= _SILENT_MICRO_TURNS):
            self._kept.append(speech)

    # --- what the client does

    def create(self, config: ResponseConfig | None) -> None:
        """Begins the response that the client asks for, with speech that was kept for it.

        Raises:
          InvalidMessage: there is a response with output, or this server does not support the configuration.
        """
        if self.current is not None and self.current.output:
            text = f"response {self.current.id} is not done yet"
            raise InvalidMessage("conversation_already_has_active_response", text)
        if config is not None:
            self.configuration.check_response(config)
            text = "\n".join([config.instructions or "", *([tools_text(config.tools)] if config.tools else [])])
            if text.strip() and self.configuration.model.reads_background:
                self.intake.queue_text(Control.BACKGROUND, text, "response.instructions", INSTRUCTIONS_TOKENS)
        if self.current is not None:
            self.end("cancelled", "client_cancelled")
        self._dropping = False
        kept, over = list(self._kept), self._silent >= _SILENT_MICRO_TURNS
        self.current = self._begin(config)
        if kept:
            self.user_turns.end_for_answer()
            for speech in kept:
                self.current.add_speech(speech.text, speech.sound, speech.tokens)
                if self.current.is_full:
                    self._dropping = not over
                    self.end("incomplete", "max_output_tokens")
                    return
            if over:
                self.end()

    def cancel(self, response_id: str | None) -> None:
        """Ends the current response at the client's wish.

        Args:
          response_id: the response to end; None: the current one.

        Raises:
          InvalidMessage: there is no such response.
        """
        if self.current is None or response_id not in (None, self.current.id):
            # OpenAI's own words: by them LiveKit's client knows that nothing is wrong.
            raise InvalidMessage("response_cancel_not_active", "Cancellation failed: no active response found")
        self._dropping = self.speaking  # a response that has not begun to speak has nothing to drop
        self._kept.clear()
        self.end("cancelled", "client_cancelled")

    def clear_track(self) -> None:
        """Ends the response that plays on the track, if one does, at the client's wish."""
        if self._on_track is not None:
            self.cancel(None)

    def leave_track(self) -> None:
        """Puts the model's voice into events from now on: the client continues over a WebSocket."""
        self.track = self._on_track = None

    def extend_deadline(self) -> None:
        """Gives an empty response its full time again, because the client has committed more sound."""
        self._deadline = self._new_deadline()

    def drop_kept_speech(self) -> None:
        """Forgets speech for which no response was asked."""
        self._kept.clear()

    def drop_stale_speech(self) -> None:
        """Forgets kept speech that is over: a later `response.create` asks for an answer to something else."""
        if self._silent >= _SILENT_MICRO_TURNS:
            self._kept.clear()

    # --- beginning and end

    def end(self, status: str = "completed", reason: str | None = None) -> None:
        """Ends the current response; `status` and `reason` as in `Response.end`."""
        assert self.current is not None
        self.current.end(status, reason)
        self.current = None
        if self._on_track is not None:
            cleared = status == "cancelled"
            if cleared and self.track is not None:
                self.track.clear()
            kind = f"output_audio_buffer.{'cleared' if cleared else 'stopped'}"
            self.events.send(kind, response_id=self._on_track)
            self._on_track = None

    def _begin(self, config: ResponseConfig | None) -> Response:
        self.configuration.formats_fixed = True
        self._silent, self._deadline = 0, self._new_deadline()
        self._kept.clear()
        return Response(self.events, self.conversation, self._settings(config))

    def _settings(self, config: ResponseConfig | None) -> ResponseSettings:
        """Returns what a new response is made with; `config` is what the client asks of it, checked."""
        session, asked = self.configuration, config or ResponseConfig()
        no_effect = fields_without_effect(asked)
        if asked.tools and not session.model.reads_background:
            no_effect["tools"] = BACKGROUND_UNREAD
        parallel = asked.parallel_tool_calls
        return ResponseSettings(
            modality=asked.output_modalities[0] if asked.output_modalities else session.modality,
            tools=session.tools if asked.tools is None else asked.tools,
            tool_choice=str(asked.tool_choice or session.tool_choice),
            parallel_tool_calls=session.parallel_tool_calls if parallel is None else parallel,
            max_output_tokens=asked.max_output_tokens or session.max_output_tokens,
            metadata=asked.metadata,
            no_effect=no_effect,
        )

    def _new_deadline(self) -> int:
        """Returns the number of the micro-turn at which a response without speech is given up.

        The model first has to hear and read everything that has arrived by now.
        """
        scheduled = self.session.scheduled
        sound = -(-self.intake.waiting_samples // MICRO_TURN_SAMPLES)
        return scheduled.micro_turns + max(sound, len(scheduled.text_queue)) + _PATIENCE_MICRO_TURNS
