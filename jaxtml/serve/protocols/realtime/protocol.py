"""OpenAI's Realtime API over a model that needs no turns: the model's own gate opens and ends responses.

The model works in micro-turns of 200 ms. In each one it decides whether it speaks (its gate is open) or is silent (its
gate is closed). What the words of the API mean on this server:

- The model hears everything as it comes, and speaks when it wants to. With turn detection (the default), a response is
  a stretch of time in which the model's gate is open. The settings of a detector have no effect.
- Without turn detection, or with `create_response` false, the client gets speech only in answer to a `response.create`.
  The client may ask a moment after the gate has opened. So the last stretch of speech, of 50 micro-turns at most, is
  kept for a `response.create` that follows.
- A user turn is a run of words that the model hears. With turn detection it ends when the gate opens, or after 4
  micro-turns without a word. Without turn detection it ends when the client commits it.
- While the model speaks, the events of a user turn are held back. Clients stop their playback at `speech_started`, and
  here only the model decides whether it stops speaking. For the same reason, words that are heard in the micro-turn in
  which the gate opens have no `speech_started`. A response that ends while the user is speaking has the status
  `cancelled`.
- `response.create` opens a response at once, but nobody can make the model speak. The response gets its speech when the
  gate opens. If the gate stays closed for 50 micro-turns, the response is completed without output. If the client sends
  another `response.create` before there is output, the first response is cancelled. `response.cancel` drops what the
  model still says.
- With WebRTC, the sound of responses goes over a track, with silence between them. The events `output_audio_buffer.*`
  say when the track starts and stops playing a response. The track's buffer holds a fraction of a second. So the server
  sends the event for the end as soon as the response ends.
- Instructions, tools, messages of the system and the assistant, and results of functions are background text to the
  model. The user's messages are typed text.
- A delegation is a task that the model hands over, in words. It becomes a call of one of the client's functions
  (`function_calls`).

The parts: `configuration` holds the session's configuration. `user_turn` makes the user's turns, and `responses` and
`response` make the model's responses. `conversation` keeps the items of both sides. `client_items` gives the client's
items to the model.
"""

from __future__ import annotations

from aiohttp import WSMsgType

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.realtime.client_items import ClientItems
from jaxtml.serve.protocols.realtime.configuration import DEFAULT_FORMAT, SessionConfiguration
from jaxtml.serve.protocols.realtime.conversation import RealtimeConversation
from jaxtml.serve.protocols.realtime.events import EventWriter
from jaxtml.serve.protocols.realtime.messages import (
    WEBRTC_MESSAGES,
    WEBSOCKET_MESSAGES,
    AppendInput,
    ClearInput,
    ClearOutput,
    CommitInput,
    ItemCreate,
    ItemDelete,
    ItemRetrieve,
    ItemTruncate,
    RealtimeSessionConfig,
    RealtimeUpdate,
    ResponseCancel,
    ResponseCreate,
    WebRtcMessage,
    WebSocketMessage,
    sound_format,
)
from jaxtml.serve.protocols.realtime.responses import Responses
from jaxtml.serve.protocols.realtime.user_turn import UserTurns
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.transport.sound import VoiceTrack
from jaxtml.stream.reading import Words
from jaxtml.stream.timebase import MICRO_TURN_MS, SAMPLE_RATE

SCOPE = "realtime"
# The error that a client gets when its session ends for one of these reasons. Otherwise it gets no error.
_END_ERRORS = {
    EndReason.EXPIRED: ("session_expired", "the session has reached its time limit"),
    EndReason.DRAINED: ("session_expired", "this server is shutting down; connect again, another server may answer"),
    EndReason.SLOW: ("slow_client", "the client did not read what it was sent"),
    EndReason.FAILED: ("internal_error", "the server failed; the session cannot go on"),
}


class RealtimeProtocol:
    """The Realtime API for one session; fulfils `SessionProtocol`. The first event is `session.created`.

    Args:
      session: the session.
      model: the model that is served.
      metrics: counts wrong messages, and measures how long function calls take.
      grace_s: how long the session waits for a client that lost its connection.
      config: configuration with which the session begins, from a short-lived key or the client's request.
      track: takes the model's voice; None: the voice goes into events.

    Raises:
      InvalidMessage: `config` is wrong.
    """

    scope = SCOPE
    frame_kind = WSMsgType.TEXT
    resumable = True

    def __init__(
        self,
        session: ClientSession,
        model: ServedModel,
        metrics: Metrics,
        grace_s: float,
        config: RealtimeSessionConfig | None = None,
        track: VoiceTrack | None = None,
    ):
        self.session, self.metrics = session, metrics
        self.intake = Intake(session, model, sound_format(DEFAULT_FORMAT))
        self.events = EventWriter(session.replay_buffer)
        self.configuration = SessionConfiguration(session, model, self.intake, track is not None)
        self.conversation = RealtimeConversation(self.events)
        self.client_items = ClientItems(session, self.intake, self.conversation, metrics)
        self.user_turns = UserTurns(self.events, self.configuration, self.conversation)
        self.responses = Responses(
            session, self.intake, self.events, self.configuration, self.conversation, self.user_turns, track
        )
        self._task = ""  # text of the delegation that the model is writing
        self._resume = {"token": session.resume_token, "grace_s": grace_s}
        if config is not None:
            self.configuration.apply(config)
        self.events.send("session.created", session=self.configuration.resource() | {"resume": self._resume})

    # --- from the session to the client

    def on_micro_turn(self, result: TickResult, words: Words) -> None:
        if words.heard:
            self.responses.drop_stale_speech()
            self.user_turns.hear(result, words.heard)
        self.responses.on_micro_turn(result, words.said)
        self._task += words.delegated
        if words.delegation_ended:
            task, self._task = self._task, ""
            self.responses.call_function(task)
        if not self.responses.speaking:
            self.user_turns.update(result)
        self.intake.flush()

    def on_expiring(self, in_s: float) -> None:
        """Sends the session again, because the API announces the end of a session only by `expires_at`."""
        del in_s
        self.events.send("session.updated", session=self.configuration.resource())

    def on_resume(self) -> None:
        self.responses.leave_track()
        resume = self._resume | {"input_audio_bytes": self.intake.received_bytes}
        self.events.send("session.updated", session=self.configuration.resource() | {"resume": resume})

    def on_end(self, reason: EndReason) -> None:
        if self.responses.current is not None:
            self.responses.end("cancelled" if reason is not EndReason.FAILED else "failed")
        if reason in _END_ERRORS:
            kind = "server_error" if reason is EndReason.FAILED else "invalid_request_error"
            self.events.send_error(InvalidMessage(*_END_ERRORS[reason]), kind)

    # --- from the client to the session

    async def receive(self, message: bytes) -> None:
        accepted = WEBSOCKET_MESSAGES if self.responses.track is None else WEBRTC_MESSAGES
        try:
            await accepted.handle(message, self._use)
        except InvalidMessage as invalid:
            self.on_unreadable(invalid)

    def on_unreadable(self, invalid: InvalidMessage) -> None:
        self.metrics.malformed_messages.labels(SCOPE).inc()
        self.events.send_error(invalid)

    async def _use(self, message: WebSocketMessage | WebRtcMessage) -> None:
        match message:
            case AppendInput():
                self.configuration.formats_fixed = True
                await self.intake.receive_audio(message.audio)
            case CommitInput():
                self._commit()
            case ClearInput():
                self.intake.clear()
                self.user_turns.clear()
                self.events.send("input_audio_buffer.cleared")
            case RealtimeUpdate():
                if self.configuration.apply(message.session):
                    self.responses.drop_kept_speech()
                self.events.send("session.updated", session=self.configuration.resource())
            case ItemCreate():
                await self.client_items.create(message.item, message.previous_item_id)
                self.responses.drop_stale_speech()
                await self.intake.wait_for_room()
            case ItemRetrieve():
                self.conversation.retrieve(message.item_id)
            case ItemDelete():
                self.conversation.delete(message.item_id)
            case ItemTruncate():
                self.conversation.truncate(message.item_id, message.content_index, message.audio_end_ms)
            case ResponseCreate():
                self.responses.create(message.response)
            case ResponseCancel():
                self.responses.cancel(message.response_id)
            case ClearOutput():
                self.responses.clear_track()

    def _commit(self) -> None:
        """Ends the user's turn because the client asks for it."""
        now_ms = self.session.scheduled.micro_turns * MICRO_TURN_MS
        self.user_turns.commit(now_ms, 1000 * self.intake.waiting_samples // SAMPLE_RATE)
        self.responses.extend_deadline()
