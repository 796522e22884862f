"""GPT-Live, the native protocol of the server: a session as events, and the messages of its client.

The model works in micro-turns of 200 ms. In each one its gate is open (the model speaks) or closed (it is silent). A
delegation is a task that the model hands to its client, in words.

Events and their fields are those of OpenAI's Live API (`openai.types.live`). These are our own additions:

- Every event has a `sequence_number`. A client that was cut off names the last number that it received
  in `session.resume`. The answer, `session.resumed`, says what arrived before the cut. `input_audio_bytes` counts the
  bytes of sound. `last_client_event_id` is the `event_id` of the last message that had one. The server handled
  every message up to that one. There are two exceptions: sound beyond `input_audio_bytes`, and a picture that the
  server was still decoding at the cut.
- `session.started` has `resume` (the token and the grace period), `turn_ms` (the length of a micro-turn) and `sees`
  (whether the model takes pictures).
- `session.output_audio.delta` has its times, and whether the model's gate was open (`speaking`).
- A delegation has its text, in `task`.
- A session has `no_effect` if the client has set fields that have no effect: their paths, each with the reason. If the
  model does not get the instructions or the history, an `info` with the code `background_text_unread` says so too.
- Clients may send typed text and pictures (`session.input_text.append`, `session.input_image.append`).

Text that a client appends is cut into pieces. Each micro-turn begins with at most one piece, so a long text takes
several micro-turns. The model reads two kinds of text. What the user types, now or in the history, is typed text.
Instructions, thinking, commentary, and the history's messages of developers and the assistant are background text. If a
client sends no sound, the model hears silence and the session goes on.

A model that was not trained on background text gets none (`ServedModel.reads_background`). Such a model gets no
history either. Without the assistant's messages, the model would answer the user's old questions.
`session.instructions.append`, `session.thinking.append` and `session.commentary.append` are then refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from aiohttp import WSMsgType

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.live import events
from jaxtml.serve.protocols.live.configuration import check_delegation, without_effect
from jaxtml.serve.protocols.live.messages import (
    SESSION_MESSAGES,
    SOUNDLESS_MESSAGES,
    AppendAudio,
    AppendCommentary,
    AppendImage,
    AppendInstructions,
    AppendText,
    AppendThinking,
    Close,
    Context,
    Delegation,
    LiveSessionConfig,
    LiveUpdate,
    Mute,
    SessionMessage,
    SoundlessMessage,
    Unmute,
    sound_format,
)
from jaxtml.serve.protocols.live.sideband import SendEvent, Sideband
from jaxtml.serve.protocols.messages import MessageTypes
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.client_session import BACKGROUND_UNREAD, ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.transport.sound import SoundEncoder, VoiceTrack
from jaxtml.stream.reading import Words
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control

SCOPE = "live"
_CONTENT_TOKENS = 500  # of one appended text
_KEPT_DELEGATIONS = 256  # the latest delegations: the client may answer each, and add to its answer later
_USAGE_MICRO_TURNS = 75  # between two `session.usage.updated`
_ANSWERED = float("-inf")
_CONTEXT_NAMES = {AppendInstructions: "instructions", AppendThinking: "thinking", AppendCommentary: "commentary"}
# The Live API's names for the end of a session, where they differ from ours.
_END_REASONS = {
    EndReason.SLOW: "connection_lost",
    EndReason.INVALID: "connection_lost",
    EndReason.FAILED: "connection_lost",
    EndReason.DRAINED: "expired",
}


class LiveProtocol:
    """GPT-Live for one session; fulfils `SessionProtocol`. The first event is `session.started`.

    Args:
      session: the session.
      model: the model that is served.
      config: what the client asks for, checked (`configuration.check`).
      metrics: counts wrong messages, and measures how long delegations take.
      grace_s: how long the session waits for a client that lost its connection.
      start_event_id: `event_id` of the client's `session.start`.
      track: takes the model's voice; None: the voice goes into events.

    Attributes:
      sidebands: connections that watch and direct the session beside its client.
      last_event_id: the last `event_id` of the client's messages.
    """

    scope = SCOPE
    frame_kind = WSMsgType.TEXT
    resumable = True

    def __init__(
        self,
        session: ClientSession,
        model: ServedModel,
        config: LiveSessionConfig,
        metrics: Metrics,
        grace_s: float,
        start_event_id: str | None = None,
        track: VoiceTrack | None = None,
    ):
        self.session, self.model, self.metrics, self.track = session, model, metrics, track
        # Not `config` itself, whose fields without effect may be large.
        self.instructions, self.no_effect = config.instructions, without_effect(config, model)
        self.format = sound_format(config.audio)
        self.intake = Intake(session, model, self.format, self._pass_input_to_sidebands)
        self.sidebands: list[Sideband] = []
        self.last_event_id = start_event_id
        self._encoder = SoundEncoder(self.format)
        self._delegations: dict[str, float] = {}  # when each was made, on the monotonic clock, or _ANSWERED
        self._task = ""  # text of the delegation that the model is writing
        started = self._resource() | {
            "resume": {"token": session.resume_token, "grace_s": grace_s},
            "turn_ms": MICRO_TURN_MS,
            "sees": model.sees,
        }
        self._send("session.started", start_event_id, session=started)
        if model.reads_background:
            self._queue_background(config)
        elif config.instructions or config.input:
            self._send("info", code="background_text_unread", message=BACKGROUND_UNREAD)

    def _queue_background(self, config: LiveSessionConfig) -> None:
        """Queues the history and the instructions. The model reads the history in its order."""
        for item in config.input or ():
            mark = Control.TYPED if item.role == "user" else Control.BACKGROUND
            self.intake.queue_text(mark, item.content[0].text, "session.input", in_order=True)
        if config.instructions:
            self.intake.queue_text(Control.BACKGROUND, config.instructions, "session.instructions")

    # --- from the session to the client

    def on_micro_turn(self, result: TickResult, words: Words) -> None:
        """Writes transcripts, sound and delegations of one micro-turn.

        The user's words get the times of the micro-turn in which the model heard them. The model's words and sound get
        the times of the next micro-turn, in which the client plays the sound.
        """
        start, end = result.t_ms, result.t_ms + MICRO_TURN_MS
        if words.heard:
            self._send("session.input_transcript.delta", delta=words.heard, start_ms=start, end_ms=end)
        if words.said:
            self._send("session.output_transcript.delta", delta=words.said, start_ms=end, end_ms=end + MICRO_TURN_MS)
        if self.track is not None:
            self.track.put(result.wave)
        else:
            delta = {"type": "session.output_audio.delta", "delta": self._encoder.encode(result.wave)}
            times = {"start_ms": end, "end_ms": end + MICRO_TURN_MS}
            self._send_to_client(delta | times | {"speaking": result.speaking})
        for sideband in self.sidebands:
            sideband.send_output(result.wave, end)
        self._task += words.delegated
        if words.delegation_ended:
            self._send_delegation(end)
        self.intake.flush()
        if result.number % _USAGE_MICRO_TURNS == _USAGE_MICRO_TURNS - 1:
            self._send("session.usage.updated", usage=self._usage())

    def on_expiring(self, in_s: float) -> None:
        text = f"this session ends in {in_s:.0f} s"
        self._send("info", code="going_away", message=text, time_left_ms=round(1000 * in_s))

    def on_resume(self) -> None:
        self.track = None

    def on_end(self, reason: EndReason) -> None:
        if reason is EndReason.FAILED:
            failed = InvalidMessage("internal_error", "the server failed; the session cannot go on")
            self._send("error", error=events.error_fields(failed, "server_error"))
        name = _END_REASONS.get(reason, reason.value)
        self._send("session.closed", reason=name, session=self._resource(), usage=self._usage())
        for sideband in self.sidebands:
            sideband.replay_buffer.close()

    def resumed_event(self, after: int, client_event_id: str | None) -> bytes:
        """Returns the `session.resumed` that answers a `session.resume`. It has no sequence number.

        Args:
          after: number of the last event that the client has received.
          client_event_id: `event_id` of the client's message.
        """
        event = {
            "type": "session.resumed",
            "event_id": f"evt_resumed_{after}",
            "session_id": self.session.id,
            "input_audio_bytes": self.intake.received_bytes,
            "last_client_event_id": self.last_event_id,
        }
        if client_event_id is not None:
            event["client_event_id"] = client_event_id
        return msgspec.json.encode(event)

    def _send_delegation(self, t_ms: int) -> None:
        """Writes the delegation that the model has finished."""
        name = f"dlg_{secrets.token_urlsafe(12)}"
        self._delegations[name] = time.monotonic()
        if len(self._delegations) > _KEPT_DELEGATIONS:
            del self._delegations[next(iter(self._delegations))]
        delegation = {"id": name, "type": "delegation", "target": "client", "task": self._task.strip()}
        self._task = ""
        self._send("session.delegation.created", offset_ms=t_ms, delegation=delegation)
        self.session.span.add_event("delegation", {"id": name})

    def _pass_input_to_sidebands(self, samples: np.ndarray) -> None:
        for sideband in self.sidebands:
            sideband.send_input(samples)

    # --- from the client to the session

    async def receive(self, message: bytes) -> None:
        accepted = SESSION_MESSAGES if self.track is None else SOUNDLESS_MESSAGES
        await self._handle(accepted, message, self._send_to_client, self._use_own)

    def on_unreadable(self, invalid: InvalidMessage) -> None:
        self._refuse(invalid, self._send_to_client)

    async def receive_from_sideband(self, message: bytes, send: SendEvent) -> None:
        """Handles one message of a sideband. `send` writes an error to that sideband."""
        await self._handle(SOUNDLESS_MESSAGES, message, send, self._use)

    async def _handle(
        self, accepted: MessageTypes[Any], message: bytes, send: SendEvent, use: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Reads and uses a message. Answers a wrong message with an `error` to its sender."""
        try:
            await accepted.handle(message, use)
        except InvalidMessage as invalid:
            self._refuse(invalid, send)

    def _refuse(self, invalid: InvalidMessage, send: SendEvent) -> None:
        self.metrics.malformed_messages.labels(SCOPE).inc()
        send(events.new_event("error", invalid.event_id, error=events.error_fields(invalid)))

    async def _use_own(self, message: SessionMessage) -> None:
        """Uses a message of the session's own client, and remembers its id.

        After a lost connection, the id tells the client which messages it need not send again. Nothing is awaited
        between remembering the id of a text and queueing the text. So a lost connection cannot come between the two.
        """
        self.last_event_id = message.event_id or self.last_event_id
        await self._use(message)

    async def _use(self, message: SessionMessage | SoundlessMessage) -> None:
        match message:
            case AppendAudio():
                await self.intake.receive_audio(message.audio)
            case AppendImage():
                await self.intake.show_image(message.image)
            case AppendText():
                self._append(message, Control.TYPED, "input_text")
            case Mute() | Unmute():
                # A client that has asked to close stays muted.
                muted = isinstance(message, Mute) or self.session.closing_at is not None
                self.session.scheduled.jitter_buffer.muted = muted
                self._send(f"session.input_audio.{'muted' if muted else 'unmuted'}", message.event_id)
            case LiveUpdate():
                self._update(message)
            case Close():
                self.session.close()
            case _:
                self._append_context(message)

    def _append_context(self, message: Context) -> None:
        if not self.model.reads_background:
            raise InvalidMessage("unsupported_event", BACKGROUND_UNREAD, "type")
        if message.delegation_id is not None:
            made_at = self._delegations.get(message.delegation_id)
            if made_at is None:
                raise InvalidMessage("delegation_not_found", "this session has no such delegation", "delegation_id")
            if made_at != _ANSWERED:
                self.metrics.delegations.observe(time.monotonic() - made_at)
                self._delegations[message.delegation_id] = _ANSWERED
                self.session.span.add_event("delegation answered", {"id": message.delegation_id})
        self._append(message, Control.BACKGROUND, _CONTEXT_NAMES[type(message)])

    def _append(self, message: Context | AppendText, mark: Control, name: str) -> None:
        """Queues text for the model. The client is told in which micro-turn the model got the end of the text."""
        event_id = message.event_id

        def send_appended(t_ms: int) -> None:
            self._send(f"session.{name}.appended", event_id, start_ms=t_ms, end_ms=t_ms + MICRO_TURN_MS)

        self.intake.queue_text(mark, message.content, "content", _CONTENT_TOKENS, send_appended)

    def _update(self, message: LiveUpdate) -> None:
        change = message.session
        if change.triggers:
            text = "this server does not support triggers"
            raise InvalidMessage("unsupported_parameter", text, "session.triggers")
        check_delegation(change.delegation)
        self._send("session.updated", message.event_id, session=self._resource())

    # --- events

    def _send(self, kind: str, client_event_id: str | None = None, **fields: Any) -> None:
        """Writes an event for the client and all sidebands."""
        event = events.new_event(kind, client_event_id, **fields)
        self._send_to_client(event)
        for sideband in self.sidebands:
            sideband.send(event)

    def _send_to_client(self, event: dict[str, Any]) -> None:
        events.append(self.session.replay_buffer, event)

    def _resource(self) -> dict[str, Any]:
        """Returns the session as events show it. Its `no_effect` names what the client asked for and did not get."""
        resource: dict[str, Any] = {
            "id": self.session.id,
            "expires_at": int(self.session.expires_at),
            "model": self.model.name,
            "status": "active",
            "audio": {
                "format": {"type": f"audio/{self.format.kind}", "rate": self.format.rate},
                "output": {"voice": "own"},
            },
            "delegation": Delegation(type="client"),
            "store": False,
            "triggers": [],
        }
        if self.instructions is not None:
            resource["instructions"] = self.instructions
        if self.no_effect:
            resource["no_effect"] = self.no_effect
        return resource

    def _usage(self) -> dict[str, Any]:
        return {"seconds": self.session.scheduled.micro_turns * MICRO_TURN_MS // 1000}
