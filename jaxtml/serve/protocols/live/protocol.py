"""GPT-Live, the native protocol: what happens in a session as its events, and what its client says.

Events and their fields are OpenAI's (`openai.types.live`). Ours besides: every event has a `sequence_number`, by which
a client that was cut off names the last one that it had (`session.resume`), and `session.resumed` what came of its own:
`input_audio_bytes`, and of all else but pictures the last `event_id` (`last_client_event_id`); `session.started` has
`resume`, `turn_ms` and `sees`; sound has its times and whether the gate was open (`speaking`); a delegation has its
`task`; typed text and pictures (`session.input_text.append`, `session.input_image.append`). What a client appends is
placed at a micro-turn's edge, in pieces as long as the model takes. Instructions, thinking, commentary and developers'
and assistants' history are background text to the model; what users say is typed text. Silence stands for sound that
does not come: the session goes on without any.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.live.messages import (
    BESIDE,
    LATER,
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
    Unmute,
    format_of,
)
from jaxtml.serve.protocols.messages import MessageTypes
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake, check_length
from jaxtml.serve.sessions.manager import ClientSession, ServedModel
from jaxtml.serve.transport.replay_buffer import ReplayBuffer
from jaxtml.serve.transport.sound import SoundEncoder, SoundFormat, VoiceTrack
from jaxtml.stream.reading import Words
from jaxtml.stream.timebase import MICRO_TURN_MS, SAMPLE_RATE
from jaxtml.stream.tokens import Control

SCOPE = "live"
_CONTENT, _INSTRUCTIONS, _HISTORY, _MESSAGES = 500, 16_384, 8_192, 128  # tokens, and messages of the history
_DELEGATIONS = 256  # that may be answered, and spoken of again
_USAGE_TURNS = 75  # between two accounts of what was used
_REFLECTED = SoundFormat("pcm", 24_000)
_CONTEXTS = {AppendInstructions: "instructions", AppendThinking: "thinking", AppendCommentary: "commentary"}
# The protocol's own words for the end of a session.
_REASONS = {EndReason.SLOW: "connection_lost", EndReason.FAILED: "connection_lost", EndReason.DRAINED: "expired"}


def check(config: LiveSessionConfig, model: ServedModel) -> None:
    """Raises `InvalidMessage` where this server cannot give such a session."""
    wants = config.delegation
    if config.model != model.name:
        raise InvalidMessage("model_not_found", f"this server has the model {model.name}", "session.model")
    if wants is not None and wants.type != "client":
        raise InvalidMessage("unsupported_value", "delegations go to the client here", "session.delegation.type")
    for name, given in (("store", config.store), ("triggers", config.triggers), ("client", config.client)):
        if given:
            raise InvalidMessage("unsupported_parameter", f"this server does not take {name}", f"session.{name}")
    if len(config.input or ()) > _MESSAGES:
        raise InvalidMessage("invalid_value", f"a history has {_MESSAGES} messages at most", "session.input")
    if not all(one.content[0].text for one in config.input or ()):
        raise InvalidMessage("invalid_value", "there is no text", "session.input")
    check_length(model, config.instructions or "", _INSTRUCTIONS, "session.instructions")
    check_length(model, "".join(one.content[0].text for one in config.input or ()), _HISTORY, "session.input")


class LiveProtocol:
    """One session's GPT-Live; a `SessionProtocol`. Begins with `session.started`.

    Args:
      session: the session whose replay buffer it fills.
      model: the model that is served.
      config: checked.
      metrics: what is counted.
      grace_s: for how long a client may be gone.
      event_id: of the client's `session.start`.
      track: where what is said goes; None: into the events.
    """

    scope = SCOPE

    def __init__(
        self,
        session: ClientSession,
        model: ServedModel,
        config: LiveSessionConfig,
        metrics: Metrics,
        grace_s: float,
        event_id: str | None = None,
        track: VoiceTrack | None = None,
    ):
        self.session, self.model, self.config, self.metrics = session, model, config, metrics
        self.track = track
        self.format = format_of(config.audio)
        self.intake, self.outgoing = Intake(session, model, self.format), SoundEncoder(self.format)
        self.sidebands: list[Sideband] = []
        self.delegated: dict[str, float] = {}  # when, on the monotonic clock; answered ones as -inf
        self.task = ""  # of a delegation that is being written
        self.last_event_id = event_id  # of the client's messages
        resource = self._resource() | {
            "resume": {"token": session.resume_token, "grace_s": grace_s},
            "turn_ms": MICRO_TURN_MS,
        }
        resource["sees"] = model.config.duplex.max_patches > 0
        self._emit("session.started", event_id, session=resource)
        for item in config.input or ():
            mark = Control.TYPED if item.role == "user" else Control.BACKGROUND
            self.intake.queue_text(mark, item.content[0].text, "input")
        if config.instructions:
            self.intake.queue_text(Control.BACKGROUND, config.instructions, "instructions")

    # --- what happens

    def on_micro_turn(self, turn: TickResult, words: Words) -> None:
        """Transcripts lie on the micro-turns: the user's on the one that was heard, ours on the one to be heard."""
        start, end = turn.t_ms, turn.t_ms + MICRO_TURN_MS
        if words.heard:
            self._emit("session.input_transcript.delta", delta=words.heard, start_ms=start, end_ms=end)
        if words.said:
            self._emit("session.output_transcript.delta", delta=words.said, start_ms=end, end_ms=end + MICRO_TURN_MS)
        if self.track is not None:
            self.track.put(turn.wave)
        else:
            delta = {"type": "session.output_audio.delta", "delta": self.outgoing.encode(turn.wave)}
            self._put(delta | {"start_ms": end, "end_ms": end + MICRO_TURN_MS, "speaking": turn.speaking})
        for one in self.sidebands:
            one.said(turn.wave, end)
        self.task += words.delegated
        if words.asked:
            name = f"dlg_{secrets.token_urlsafe(12)}"
            self.delegated[name] = time.monotonic()
            if len(self.delegated) > _DELEGATIONS:
                del self.delegated[next(iter(self.delegated))]
            delegation = {"id": name, "type": "delegation", "target": "client", "task": self.task.strip()}
            self.task = ""
            self._emit("session.delegation.created", offset_ms=end, delegation=delegation)
            self.session.span.add_event("delegation", {"id": name})
        self.intake.flush()
        if turn.number % _USAGE_TURNS == _USAGE_TURNS - 1:
            self._emit("session.usage.updated", usage=self._usage())

    def on_expiring(self, in_s: float) -> None:
        """An `info` long before, and the time in the session's `expires_at`."""
        self._emit(
            "info", code="going_away", message=f"this session ends in {in_s:.0f} s", time_left_ms=round(1000 * in_s)
        )

    def on_end(self, why: EndReason) -> None:
        reason = _REASONS.get(why, why.value)
        if why is EndReason.FAILED:
            failed = InvalidMessage("internal_error", "the server failed; the session cannot go on")
            self._emit("error", error=error_of(failed, "server_error"))
        self._emit("session.closed", reason=reason, session=self._resource(), usage=self._usage())
        for one in self.sidebands:
            one.replay_buffer.close()

    # --- what the client says

    async def receive(self, data: bytes) -> None:
        """A message of the client's. Who has a track has no other way for sound."""
        await self._read(LATER if self.track is None else BESIDE, data, self._put, self._noted)

    def untracked(self) -> None:
        """Its client is back over a WebSocket: sound is in the events from now on."""
        self.track = None

    async def hear(self, samples: np.ndarray) -> None:
        """`[N]` float32 at 16 kHz, from a track."""
        self._reflected(samples)
        await self.intake.receive_track(samples)

    async def direct(self, data: bytes, put: Callable[[dict[str, Any]], None]) -> None:
        """A message of someone beside the session."""
        await self._read(BESIDE, data, put, self._take)

    async def _read(
        self,
        vocabulary: MessageTypes[Any],
        data: bytes,
        put: Callable[[dict[str, Any]], None],
        take: Callable[[Any], Awaitable[None]],
    ) -> None:
        """What is wrong with a message becomes an `error` for who sent it."""
        try:
            await vocabulary.taken(data, take)
        except InvalidMessage as invalid:
            self.metrics.malformed_messages.labels(SCOPE).inc()
            put(_event("error", invalid.event_id, error=error_of(invalid)))

    async def _noted(self, message: Any) -> None:
        """A message of the client's own: text is said before anything waits, so that what is noted is said."""
        self.last_event_id = message.event_id or self.last_event_id
        await self._take(message)

    async def _take(self, message: Any) -> None:
        match message:
            case AppendAudio():
                await self.intake.receive_audio(message.audio, self._reflected)
            case AppendImage():
                await self.intake.show_image(message.image)
            case AppendText():
                self._append(message, Control.TYPED, "input_text")
            case Mute() | Unmute():
                # Who has asked to close has nothing more to say.
                self.session.scheduled.jitter_buffer.muted = muted = (
                    isinstance(message, Mute) or self.session.closing_at is not None
                )
                self._emit(f"session.input_audio.{'muted' if muted else 'unmuted'}", message.event_id)
            case LiveUpdate():
                self._update(message)
            case Close():
                self.session.close()
            case _:
                self._appended(message)

    def _reflected(self, samples: np.ndarray) -> None:
        for one in self.sidebands:
            one.heard(samples)

    def _appended(self, message: Context) -> None:
        if message.delegation_id is not None:
            asked_at = self.delegated.get(message.delegation_id)
            if asked_at is None:
                raise InvalidMessage("delegation_not_found", "this session has no such delegation", "delegation_id")
            if asked_at >= 0:
                self.metrics.delegations.observe(time.monotonic() - asked_at)
                self.delegated[message.delegation_id] = float("-inf")
                self.session.span.add_event("delegation answered", {"id": message.delegation_id})
        self._append(message, Control.BACKGROUND, _CONTEXTS[type(message)])

    def _append(self, message: Context | AppendText, mark: Control, name: str) -> None:
        event_id = message.event_id
        self.intake.queue_text(mark, message.content, "content", _CONTENT, lambda at: self._placed(name, at, event_id))

    def _placed(self, name: str, t_ms: int, event_id: str | None) -> None:
        self._emit(f"session.{name}.appended", event_id, start_ms=t_ms, end_ms=t_ms + MICRO_TURN_MS)

    def _update(self, message: LiveUpdate) -> None:
        wants = message.session.delegation
        if message.session.triggers:
            raise InvalidMessage("unsupported_parameter", "this server does not take triggers", "session.triggers")
        if wants is not None and wants.type != "client":
            raise InvalidMessage("invalid_value", "the type of delegation cannot change", "session.delegation.type")
        self._emit("session.updated", message.event_id, session=self._resource())

    # --- events

    def _emit(self, kind: str, client_event_id: str | None = None, **fields: Any) -> None:
        """An event to the client and its observers."""
        event = _event(kind, client_event_id, **fields)
        self._put(event)
        for one in self.sidebands:
            one.put(event)

    def _put(self, event: dict[str, Any]) -> None:
        self.session.replay_buffer.append(
            msgspec.json.encode(event | {"sequence_number": self.session.replay_buffer.last_number + 1})
        )

    def _resource(self) -> dict[str, Any]:
        """The session as it is: what was asked for and does not hold is not in it."""
        delegation = Delegation(type="client")
        resource: dict[str, Any] = {
            "id": self.session.id,
            "expires_at": int(self.session.expires_at),
            "model": self.model.name,
            "status": "active",
            "audio": {
                "format": {"type": f"audio/{self.format.kind}", "rate": self.format.rate},
                "output": {"voice": "own"},
            },
            "delegation": delegation,
            "store": False,
            "triggers": [],
        }
        if self.config.instructions is not None:
            resource["instructions"] = self.config.instructions
        return resource

    def _usage(self) -> dict[str, Any]:
        return {"seconds": self.session.scheduled.micro_turns * MICRO_TURN_MS // 1000}


class Sideband:
    """Someone who watches and directs a session from beside: its events, and both voices as 24 kHz PCM with times."""

    def __init__(self, live: LiveProtocol):
        self.live, self.replay_buffer = live, ReplayBuffer()
        self.ears, self.mouth = SoundEncoder(_REFLECTED), SoundEncoder(_REFLECTED)
        self.unheard = np.zeros(0, np.float32)

    def heard(self, samples: np.ndarray) -> None:
        """What the client sent, before it is muted; in chunks of a micro-turn."""
        self.unheard = np.concatenate([self.unheard, samples])
        size = SAMPLE_RATE * MICRO_TURN_MS // 1000
        while len(self.unheard) >= size:
            chunk, self.unheard = self.unheard[:size], self.unheard[size:]
            self.put({"type": "session.input_audio.append", "audio": self.ears.encode(chunk)})

    def said(self, wave: np.ndarray, t_ms: int) -> None:
        """What is to be heard from `t_ms` on."""
        event = {"type": "session.output_audio.delta", "delta": self.mouth.encode(wave)}
        self.put(event | {"start_ms": t_ms, "end_ms": t_ms + MICRO_TURN_MS})

    def put(self, event: dict[str, Any]) -> None:
        self.replay_buffer.append(msgspec.json.encode(event | {"sequence_number": self.replay_buffer.last_number + 1}))

    async def receive(self, data: bytes) -> None:
        """What the client may say too, but for sound."""
        await self.live.direct(data, self.put)


def _event(kind: str, client_event_id: str | None = None, **fields: Any) -> dict[str, Any]:
    event = {"type": kind, "event_id": f"evt_{secrets.token_urlsafe(12)}", **fields}
    return event if client_event_id is None else event | {"client_event_id": client_event_id}


def error_of(invalid: InvalidMessage, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The inside of an `error` event."""
    error: dict[str, Any] = {"type": kind, "code": invalid.code, "message": str(invalid)}
    if invalid.param is not None:
        error["param"] = invalid.param
    if invalid.event_id is not None:
        error["client_event_id"] = invalid.event_id
    return error
