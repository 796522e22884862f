"""OpenAI's Realtime API over a model that needs no turns: its own gate opens and ends responses.

What the API's words mean here:

- The model hears everything as it comes and speaks when it wants to. With turn detection (the default), a response is
  each stretch in which its gate is open; what would tune a detector has no effect. Without (or with `create_response`
  false), what it says reaches the client in answer to a `response.create` alone, which may come a moment later than the
  gate opens: the last stretch, of `_PATIENCE` micro-turns at most, is kept for it.
- The user's turn is a stretch of words heard. With turn detection it ends when the gate opens, or `_QUIET` micro-turns
  without a word; without, when the client commits it. While the model speaks its events are held back: clients stop
  their playback at `speech_started`, and whether it stops is the model's to say. For the same reason words that are
  heard in the micro-turn in which the gate opens have no `speech_started`. A response that ends while the user has the
  word is `cancelled`.
- `response.create` opens a response at once; it is filled when the gate opens, and done and empty if it does not in
  `_PATIENCE` micro-turns, or gives way to the next: nobody can make the model speak. `response.cancel` drops what is
  still said.
- Over a track goes what would else be a response's deltas, and silence besides. The buffer that `output_audio_buffer.*`
  tell of is the track's, a fraction of a second: it is over when the response is.
- Instructions, tools, system and assistant messages and results of functions are background text, the user's messages
  are typed text. A delegation is a call of a function (`realtime_response.call_of`).
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from collections import OrderedDict, deque
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.realtime.messages import (
    CLIENT,
    PEER,
    Append,
    AudioFormat,
    AudioInput,
    AudioOutput,
    CallItem,
    Clear,
    ClearOutput,
    Commit,
    ConversationItem,
    ItemCreate,
    ItemDelete,
    ItemRetrieve,
    ItemTruncate,
    MessageItem,
    OutputItem,
    Pcm,
    RealtimeSessionConfig,
    RealtimeUpdate,
    ResponseCancel,
    ResponseCreate,
    Tool,
    TurnDetection,
    format_of,
)
from jaxtml.serve.protocols.realtime.response import Response, call_of
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.sessions.manager import ClientSession, ServedModel
from jaxtml.serve.transport.sound import SoundDecoder, SoundEncoder, SoundFormat, VoiceTrack
from jaxtml.stream.reading import Words
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.stream.tokens import Control

SCOPE = "realtime"
_QUIET = 4  # micro-turns without a word that end the user's turn
_HANG = 2  # with the gate closed that end a response
_PATIENCE = 50  # until a response that was asked for is given up
_ITEMS = 256  # of the conversation that are kept
_TEXT, _INSTRUCTIONS = 8_192, 16_384  # tokens
_RECORDING = SoundFormat("pcm", 24_000)  # in a message, whatever the session's format


class RealtimeProtocol:
    """One session's Realtime API; a `SessionProtocol`. Begins with `session.created`.

    Args:
      session: the session whose replay buffer it fills.
      model: the model that is served.
      metrics: what is counted.
      grace_s: for how long a client may be gone.
      begins_as: what a short-lived key, or the request, says of the session.
      track: where what is said goes; None: into the events.
    """

    scope = SCOPE

    def __init__(
        self,
        session: ClientSession,
        model: ServedModel,
        metrics: Metrics,
        grace_s: float,
        begins_as: RealtimeSessionConfig | None = None,
        track: VoiceTrack | None = None,
    ):
        self.session, self.model, self.metrics = session, model, metrics
        self.track = track
        self.sounding: str | None = None  # the response that the track has sound of
        self.conversation = f"conv_{secrets.token_urlsafe(12)}"
        self.detection: TurnDetection | None = TurnDetection(type="server_vad")
        self.input_format: AudioFormat = Pcm(rate=24_000)
        self.output_format: AudioFormat = Pcm(rate=24_000)
        self.modality, self.instructions = "audio", ""
        self.tools: list[Tool] = []
        self.intake = Intake(session, model, format_of(self.input_format))
        self.outgoing = SoundEncoder(format_of(self.output_format))
        self.items: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.response: Response | None = None
        self.closed = 0  # micro-turns that the gate is closed
        self.due = 0  # micro-turn at which a response that nothing came of is given up
        self.dropped = False  # what is said until the gate closes reaches nobody
        self.task = ""  # of a delegation that is being written
        self.held: deque[tuple[str, bytes | None]] = deque(maxlen=_PATIENCE)  # said, and not asked for yet
        # Functions that wait for their result: when the model called them, on the monotonic clock; None: a client says.
        self.called: OrderedDict[str, float | None] = OrderedDict()
        self.user: _UserTurn | None = None
        self.spoken = False  # the sound of this session has a format that cannot change any more
        if begins_as is not None:
            self._configure(begins_as)
        self._resume = {"token": session.resume_token, "grace_s": grace_s}
        self._emit("session.created", session=self.resource() | {"resume": self._resume})

    # --- what happens

    def on_micro_turn(self, turn: TickResult, words: Words) -> None:
        self._heard(turn, words.heard)
        sound = self.outgoing.encode(turn.wave) if self.track is None else None
        said = self._said(turn, words.said, sound)
        if self.track is not None:
            self.track.put(turn.wave if said else np.zeros_like(turn.wave))
        self.task += words.delegated
        if words.asked:
            self._delegated()
        if self.response is None or self.response.message is None:
            self._settle(turn)
        self.intake.flush()

    def on_expiring(self, in_s: float) -> None:
        """The API has no other word for it than the time in `expires_at`."""
        del in_s
        self._emit("session.updated", session=self.resource())

    def on_end(self, why: EndReason) -> None:
        if self.response is not None:
            self._end("cancelled" if why is not EndReason.FAILED else "failed")
        if why in _LAST_WORDS:
            kind = "server_error" if why is EndReason.FAILED else "invalid_request_error"
            self.fail(InvalidMessage(*_LAST_WORDS[why]), kind)

    def _heard(self, turn: TickResult, text: str) -> None:
        if text:
            if self.closed >= _HANG:
                self.held.clear()  # it was an answer to something else
            if self.user is None:
                self.user = _UserTurn(turn.t_ms)
            self.user.text += text
            self.user.end_ms = turn.t_ms + MICRO_TURN_MS

    def _settle(self, turn: TickResult) -> None:
        """Tells of the user's turn where it is over, or, to those who stop what they play, that it is there."""
        user = self.user
        if user is None:
            return
        if not user.told:
            user.told = True
            self._detected("speech_started", audio_start_ms=user.start_ms, item_id=user.id)
        over = user.committed or self.detection is not None
        if over and user.quiet_ms(turn) >= _QUIET * MICRO_TURN_MS:
            self._finish(user)

    def _finish(self, user: _UserTurn) -> None:
        """The user's turn as an item of the conversation."""
        self.user = None
        if not user.committed:
            if user.told:
                self._detected("speech_stopped", audio_end_ms=user.end_ms, item_id=user.id)
            self._commit(user)
        item = self.items.get(user.id)
        usage = {"type": "duration", "seconds": (user.end_ms - user.start_ms) / 1000}
        where = {"item_id": user.id, "content_index": 0}
        name = "conversation.item.input_audio_transcription"
        self._emit(f"{name}.delta", delta=user.text, **where)
        self._emit(f"{name}.completed", transcript=user.text, usage=usage, **where)
        if item is not None:
            item["content"] = [{"type": "input_audio", "transcript": user.text}]
            item["status"] = "completed"
            self._keep(item, True)

    def _commit(self, user: _UserTurn) -> None:
        user.committed = True
        self._emit("input_audio_buffer.committed", item_id=user.id, previous_item_id=self._last())
        content = [{"type": "input_audio", "transcript": None}]
        item = {"id": user.id, "object": "realtime.item", "type": "message", "role": "user"}
        self._keep(item | {"status": "in_progress", "content": content}, False)

    def _detected(self, name: str, **fields: Any) -> None:
        if self.detection is not None:
            self._emit(f"input_audio_buffer.{name}", **fields)

    def _said(self, turn: TickResult, text: str, sound: bytes | None) -> bool:
        """Whether a response has what is said, and its client wants to hear it."""
        speaks = turn.speaking or bool(text)
        self.dropped = self.dropped and speaks
        if self.response is None:
            if self.detection is None or self.detection.create_response is False:
                self._hold(text, sound, speaks)
                return False
            if not speaks or self.dropped:
                return False
            self._answered()
            self.response = self._begun(None)
        if speaks and self.response.message is None:
            self._answered()
        self.closed = 0 if speaks else self.closed + 1
        if speaks or self.response.message is not None:
            self.response.say(text, sound)
        begun = self.response.message is not None
        audible = begun and self.response.modality == "audio"
        if audible and self.track is not None and self.sounding is None:
            self.sounding = self.response.id
            self._emit("output_audio_buffer.started", response_id=self.sounding)
        over = self.closed >= _HANG if begun else turn.number + 1 >= self.due
        if over:
            user = self.user if self.detection is not None else None
            interrupted = user is not None and user.text and user.quiet_ms(turn) < _QUIET * MICRO_TURN_MS
            self._end(*(("cancelled", "turn_detected") if interrupted else ("completed",)))
        return audible

    def _hold(self, text: str, sound: bytes | None, speaks: bool) -> None:
        """Keeps what is said for a `response.create`. A track has only what is said now."""
        if speaks and self.closed >= _HANG:
            self.held.clear()
        self.closed = 0 if speaks else self.closed + 1
        if self.closed > _PATIENCE or self.track is not None and self.modality == "audio":
            self.held.clear()
        elif not self.dropped and (speaks or self.held and self.closed <= _HANG):
            self.held.append((text, sound))

    def _answered(self) -> None:
        """The model speaks: where turns are detected, the user's is over."""
        if self.user is not None and (self.detection is not None or self.user.committed):
            self._finish(self.user)

    def _begun(self, asked: ResponseCreate | None) -> Response:
        config = asked.response if asked is not None else None
        modalities = (config.output_modalities if config else None) or [self.modality]
        self.spoken, self.closed, self.due = True, 0, self._patience()
        self.held.clear()
        metadata = config.metadata if config else None
        return Response(self._emit, modalities[0], self.conversation, metadata, self._keep)

    def _patience(self) -> int:
        """The micro-turn until which what has come by now may be answered: it is heard, and read, first."""
        session = self.session.scheduled
        return (
            session.micro_turns
            + max(-(-self.intake.waiting_samples // MICRO_TURN_SAMPLES), len(session.text_queue))
            + _PATIENCE
        )

    def _end(self, status: str = "completed", reason: str | None = None) -> None:
        assert self.response is not None
        self.response.end(status, reason)
        self.response = None
        if self.sounding is not None:
            cleared = status == "cancelled"
            if cleared and self.track is not None:
                self.track.clear()
            self._emit(f"output_audio_buffer.{'cleared' if cleared else 'stopped'}", response_id=self.sounding)
            self.sounding = None

    def _delegated(self) -> None:
        """A delegation becomes a call of a function; where the client has none, nobody could answer."""
        task, self.task = self.task, ""
        if not self.tools:
            return
        alone = self.response is None or self.response.message is None
        if self.response is None:
            self.response = self._begun(None)
        item = self.response.call(*call_of(task, self.tools))
        self._call(item["call_id"], time.monotonic())
        self.session.span.add_event("delegation", {"id": item["call_id"]})
        if alone:
            self._end()

    def _call(self, name: str, when: float | None) -> None:
        """A function that may be answered."""
        self.called[name] = when
        while len(self.called) > _ITEMS:
            self.called.popitem(last=False)

    # --- what the client says

    async def receive(self, data: bytes) -> None:
        """A message of the client's. What is wrong with it becomes an `error`."""
        try:
            await (CLIENT if self.track is None else PEER).taken(data, self._take)
        except InvalidMessage as invalid:
            self.metrics.malformed_messages.labels(SCOPE).inc()
            self.fail(invalid)

    def untracked(self) -> None:
        """Its client is back over a WebSocket: sound is in the events from now on. It is told what came of its own."""
        self.track = self.sounding = None
        resume = self._resume | {"input_audio_bytes": self.intake.received_bytes}
        self._emit("session.updated", session=self.resource() | {"resume": resume})

    async def hear(self, samples: np.ndarray) -> None:
        """`[N]` float32 at 16 kHz, from a track."""
        await self.intake.receive_track(samples)

    async def _take(self, message: Any) -> None:
        match message:
            case Append():
                self.spoken = True
                await self.intake.receive_audio(message.audio)
            case Commit():
                self._committed()
            case Clear():
                self.intake.clear()
                self._emit("input_audio_buffer.cleared")
            case RealtimeUpdate():
                self._configure(message.session)
                self._emit("session.updated", session=self.resource())
            case ItemCreate():
                await self._create(message.item)
            case ItemRetrieve():
                self._emit("conversation.item.retrieved", item=self._item(message.item_id, "retrieve"))
            case ItemDelete():
                self._item(message.item_id, "delete")
                del self.items[message.item_id]
                self._emit("conversation.item.deleted", item_id=message.item_id)
            case ItemTruncate():
                self._item(message.item_id, "truncate")
                where = {"item_id": message.item_id, "content_index": message.content_index}
                self._emit("conversation.item.truncated", audio_end_ms=message.audio_end_ms, **where)
            case ResponseCreate():
                self._create_response(message)
            case ResponseCancel():
                if self.response is None or message.response_id not in (None, self.response.id):
                    # OpenAI's own words, by which LiveKit's client knows that nothing is wrong.
                    raise InvalidMessage("response_cancel_not_active", "Cancellation failed: no active response found")
                self._cancel()
            case ClearOutput():
                if self.sounding is not None:
                    self._cancel()

    def _cancel(self) -> None:
        assert self.response is not None
        self.dropped = self.response.message is not None  # one that only waits drops nothing
        self.held.clear()
        self._end("cancelled", "client_cancelled")

    def _committed(self) -> None:
        if not self.intake.received_bytes:
            raise InvalidMessage("input_audio_buffer_commit_empty", "there is no sound to commit")
        if self.user is not None and self.user.committed:
            self._finish(self.user)
        now = self.session.scheduled.micro_turns * MICRO_TURN_MS
        self.user = self.user or _UserTurn(now)
        self.user.told = True
        self.user.end_ms = max(self.user.end_ms, now + 1000 * self.intake.waiting_samples // SAMPLE_RATE)
        self.due = self._patience()
        self._commit(self.user)

    def _create_response(self, message: ResponseCreate) -> None:
        if self.response is not None and self.response.output:
            text = f"response {self.response.id} is not done yet"
            raise InvalidMessage("conversation_already_has_active_response", text)
        config = message.response
        if config is not None and config.input:
            raise InvalidMessage("unsupported_parameter", "a response is of the conversation here", "response.input")
        if config is not None and config.instructions:
            self.intake.queue_text(Control.BACKGROUND, config.instructions, "response.instructions", _INSTRUCTIONS)
        if self.response is not None:
            self._end("cancelled", "client_cancelled")
        self.dropped = False
        held, over = list(self.held), self.closed >= _HANG
        self.response = self._begun(message)
        if held:
            self._answered()
            for text, sound in held:
                self.response.say(text, sound)
            if over:
                self._end()

    async def _create(self, item: ConversationItem) -> None:
        if item.id in self.items:
            raise InvalidMessage("item_create_duplicate_item_id", "there is an item of this id", "item.id")
        match item:
            case MessageItem():
                await self._say(item)
            case OutputItem():
                if item.call_id not in self.called:
                    raise InvalidMessage("item_call_id_not_found", "no function was called by this id", "item.call_id")
                if item.output:
                    self.intake.queue_text(Control.BACKGROUND, item.output, "item.output", _TEXT)
                if (asked := self.called.pop(item.call_id)) is not None:
                    self.metrics.delegations.observe(time.monotonic() - asked)
                    self.session.span.add_event("delegation answered", {"id": item.call_id})
            case CallItem():
                self.intake.queue_text(Control.BACKGROUND, f"{item.name}({item.arguments})", "item.arguments", _TEXT)
                if item.call_id is not None:  # of a conversation before this one
                    self._call(item.call_id, None)
        if self.closed >= _HANG:
            self.held.clear()  # it was an answer to something else
        made = msgspec.to_builtins(item) | {"object": "realtime.item", "status": "completed"}
        made.pop("phase", None)
        for part in made.get("content", ()):  # sound and pictures are not given back, nor what was not looked at
            seen = bool(part.get("audio") or part.get("image_url"))
            unread = [name for name, there in (("text", seen), ("transcript", seen or part.get("text"))) if there]
            for name in ("audio", "image_url", "detail", *unread):
                part.pop(name, None)
        made["id"] = item.id or f"item_{secrets.token_urlsafe(12)}"
        self._keep(made, False)
        self._keep(made, True)
        await self.intake.wait_for_room()

    async def _say(self, item: MessageItem) -> None:
        """Gives the model all parts of a message, of pictures the last: those before it are not even decoded.

        All or, where one is refused (`InvalidMessage`) or the connection is lost meanwhile, none.
        """
        texts: list[str] = []
        sounds: list[np.ndarray] = []
        picture = None
        for n, part in enumerate(item.content):
            where = f"item.content[{n}]"
            if part.type == "input_audio" and part.audio:
                sounds.append(_RECORDING.decode(part.audio))
            elif part.type == "input_image" and part.image_url is not None:
                picture = _picture(part.image_url, f"{where}.image_url")
            elif text := part.text or part.transcript:
                texts.append(text)
            else:
                raise InvalidMessage("invalid_value", f"{where} has nothing in it", where)
        tokens = self.intake.read_text("\n".join(texts), "item.content", _TEXT) if texts else []
        patches = None if picture is None else await self.intake.read_image(picture)
        await self.intake.wait_for_room()
        # From here on nothing waits, so that nothing can come between.
        if tokens:
            self.intake.queue_tokens(Control.TYPED if item.role == "user" else Control.BACKGROUND, tokens)
        if patches is not None:
            self.session.scheduled.set_patches(patches)
        for samples in sounds:
            self.intake.push_nowait(self._recordings.resample(samples))

    # --- the session

    def _configure(self, config: RealtimeSessionConfig) -> None:
        """Takes what is given, all of it or, where something is wrong (`InvalidMessage`), nothing."""
        if config.model is not None and config.model != self.model.name:
            raise InvalidMessage("model_not_found", f"this server has the model {self.model.name}", "session.model")
        heard = config.audio.input if config.audio and config.audio.input else AudioInput()
        said = config.audio.output if config.audio and config.audio.output else AudioOutput()
        formats = (heard.format or self.input_format, said.format or self.output_format)
        if self.spoken and tuple(map(format_of, formats)) != self._formats():
            raise InvalidMessage(
                "invalid_value", "there has been sound already: its format cannot change", "session.audio"
            )
        instructions = config.instructions if config.instructions is not None else self.instructions
        tools = self.tools if config.tools is None else config.tools
        told = "" if instructions == self.instructions else instructions
        if tools != self.tools:
            told += "\n" + json.dumps([msgspec.to_builtins(tool) for tool in tools])
        if told.strip():
            self.intake.queue_text(Control.BACKGROUND, told, "session.instructions", _INSTRUCTIONS)
        self.instructions, self.tools = instructions, tools
        if config.output_modalities:
            self.modality = config.output_modalities[0]
        if not isinstance(heard.turn_detection, msgspec.UnsetType):
            self.detection = heard.turn_detection
            self.held.clear()
        if tuple(map(format_of, formats)) != self._formats():
            self.input_format, self.output_format = formats
            self.held.clear()
            self.intake.decoder = SoundDecoder(format_of(formats[0]))
            self.outgoing = SoundEncoder(format_of(formats[1]))

    def _formats(self) -> tuple[SoundFormat, SoundFormat]:
        return format_of(self.input_format), format_of(self.output_format)

    def resource(self) -> dict[str, Any]:
        """The session as it is."""
        detection = None
        if self.detection is not None:
            answers = self.detection.create_response is not False
            detection = {"type": self.detection.type, "create_response": answers, "interrupt_response": True}
        heard, said = (_described(one) for one in (self.input_format, self.output_format))
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
                "input": {"format": heard, "turn_detection": detection},
                "output": {"format": said, "voice": "own"},
            },
        }

    @cached_property
    def _recordings(self) -> SoundDecoder:
        return SoundDecoder(_RECORDING)

    # --- items and events

    def _item(self, name: str, to: str) -> dict[str, Any]:
        """Raises `InvalidMessage` where there is none to `retrieve`, `delete` or `truncate`."""
        item = self.items.get(name)
        if item is None:
            raise InvalidMessage(f"item_{to}_invalid_item_id", "there is no such item, or no longer", "item_id")
        return item

    def _last(self) -> str | None:
        return next(reversed(self.items), None)

    def _keep(self, item: dict[str, Any], done: bool) -> None:
        """An item of the conversation is added, or done."""
        before = self._last() if item["id"] not in self.items else None
        self.items[item["id"]] = item
        while len(self.items) > _ITEMS:
            self.items.popitem(last=False)
        kind = "conversation.item.done" if done else "conversation.item.added"
        self._emit(kind, item=dict(item), previous_item_id=before)

    def fail(self, invalid: InvalidMessage, kind: str = "invalid_request_error") -> None:
        """An `error`."""
        error = {"type": kind, "code": invalid.code, "message": str(invalid), "param": invalid.param}
        self._emit("error", error=error | {"event_id": invalid.event_id})

    def _emit(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": f"event_{secrets.token_urlsafe(12)}", **fields}
        event["sequence_number"] = self.session.replay_buffer.last_number + 1
        self.session.replay_buffer.append(msgspec.json.encode(event))


_LAST_WORDS = {
    EndReason.EXPIRED: ("session_expired", "the session has lasted as long as it may"),
    EndReason.DRAINED: ("session_expired", "this server ends; another one may be there"),
    EndReason.SLOW: ("slow_client", "the client did not take what it was sent"),
    EndReason.FAILED: ("internal_error", "the server failed; the session cannot go on"),
}


class _UserTurn:
    """Words of the user's, from the first to the last."""

    def __init__(self, start_ms: int):
        self.id = f"item_{secrets.token_urlsafe(12)}"
        self.start_ms, self.end_ms, self.text = start_ms, start_ms, ""
        self.told = self.committed = False

    def quiet_ms(self, turn: TickResult) -> int:
        """Since the last word, at the end of a micro-turn."""
        return turn.t_ms + MICRO_TURN_MS - self.end_ms


def _picture(url: str, param: str) -> bytes:
    """What a `data:` URL holds. Raises `InvalidMessage`."""
    head, _, data = url.partition(";base64,")
    if not head.startswith("data:image/"):
        raise InvalidMessage("invalid_value", "a picture comes as a data: URL", param)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InvalidMessage("invalid_value", "a picture is base64", param) from error


def _described(given: AudioFormat) -> dict[str, Any]:
    form = format_of(given)
    return {"type": f"audio/{form.kind}"} | ({"rate": form.rate} if form.kind == "pcm" else {})
