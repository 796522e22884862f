"""User turns of the Realtime API: from the words that the model hears to items and events.

A user turn is a run of words that the model hears. With turn detection it ends when the model starts to speak, or after
`_QUIET_MICRO_TURNS` micro-turns (200 ms each) without a word. Without turn detection it ends when the client commits
it. Called by `protocol` and `responses`.
"""

from __future__ import annotations

import secrets

from jaxtml.serve.protocols.realtime.configuration import SessionConfiguration
from jaxtml.serve.protocols.realtime.conversation import RealtimeConversation
from jaxtml.serve.protocols.realtime.events import EventWriter
from jaxtml.serve.runtime.scheduler import TickResult
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.stream.timebase import MICRO_TURN_MS, SAMPLE_RATE

_SHORTEST_COMMIT_MS = 100  # as in OpenAI's API
_QUIET_MICRO_TURNS = 4  # this many micro-turns without a word end a user turn


class _UserTurn:
    """One user turn. Times are in ms of the session.

    Attributes:
      id: of the turn's item.
      start_ms: beginning of the micro-turn with the first word.
      end_ms: end of the micro-turn with the last word, or of the sound that the client committed.
      text: the words.
      announced: the client knows that the turn has begun.
      committed: the turn is an item of the conversation, because the client has committed it or because it has ended.
    """

    def __init__(self, start_ms: int):
        self.id = f"item_{secrets.token_urlsafe(12)}"
        self.start_ms, self.end_ms, self.text = start_ms, start_ms, ""
        self.announced = self.committed = False

    def is_over(self, result: TickResult) -> bool:
        """Whether enough micro-turns without a word have passed, at the end of the micro-turn `result`."""
        return result.t_ms + MICRO_TURN_MS - self.end_ms >= _QUIET_MICRO_TURNS * MICRO_TURN_MS


class UserTurns:
    """The user turns of one session, one after the other."""

    def __init__(self, events: EventWriter, configuration: SessionConfiguration, conversation: RealtimeConversation):
        self.events, self.configuration, self.conversation = events, configuration, conversation
        self._current: _UserTurn | None = None
        self._committed_ms = 0.0  # duration of the client's sound up to the last commit or clear

    @property
    def _detected(self) -> bool:
        return self.configuration.turn_detection is not None

    def hear(self, result: TickResult, text: str) -> None:
        """Adds the words that were heard in one micro-turn."""
        if self._current is None:
            self._current = _UserTurn(result.t_ms)
        self._current.text += text
        self._current.end_ms = result.t_ms + MICRO_TURN_MS

    def update(self, result: TickResult) -> None:
        """Announces a turn that has begun, and finishes a turn that is over.

        Called after each micro-turn in which the model does not speak. Clients stop what they play when they read
        `speech_started`. While the model speaks, only the model decides whether it stops.
        """
        turn = self._current
        if turn is None:
            return
        if not turn.announced:
            turn.announced = True
            self._send_detected("speech_started", audio_start_ms=turn.start_ms, item_id=turn.id)
        if (turn.committed or self._detected) and turn.is_over(result):
            self._finish(turn)

    def end_for_answer(self) -> None:
        """Finishes the turn because the model answers. Without turn detection, only a committed turn is finished."""
        if self._current is not None and (self._detected or self._current.committed):
            self._finish(self._current)

    def interrupts(self, result: TickResult) -> bool:
        """Whether the user is speaking at the end of a micro-turn. Without turn detection nobody interrupts."""
        turn = self._current
        return turn is not None and self._detected and bool(turn.text) and not turn.is_over(result)

    def clear(self) -> None:
        """Forgets the client's sound since the last commit, because the client discards it.

        With turn detection, words that the model has heard stay part of the user's turn.
        """
        self._committed_ms = self.configuration.intake.received_ms
        if not self._detected and self._current is not None and not self._current.committed:
            self._current = None

    def commit(self, now_ms: int, waiting_ms: int) -> None:
        """Makes the user's turn an item, because the client asks for it.

        The item gets its transcript later, because the model first has to hear the sound that has arrived.

        Args:
          now_ms: time of the session.
          waiting_ms: duration of the sound that has arrived and that the model has not heard yet.

        Raises:
          InvalidMessage: no sound has arrived since the last commit or clear, or too little.
        """
        intake = self.configuration.intake
        new_ms = intake.received_ms - self._committed_ms
        if new_ms < _SHORTEST_COMMIT_MS:
            text = f"too little sound to commit: {new_ms:.0f} ms came since the last commit or clear, and at least"
            raise InvalidMessage("input_audio_buffer_commit_empty", f"{text} {_SHORTEST_COMMIT_MS} ms are needed")
        self._committed_ms = intake.received_ms
        intake.drop_half_sample()
        if self._current is not None and self._current.committed:
            self._finish(self._current)
        turn = self._current = self._current or _UserTurn(now_ms)
        turn.announced = True
        turn.end_ms = max(turn.end_ms, now_ms + waiting_ms)
        self._commit(turn)

    def _finish(self, turn: _UserTurn) -> None:
        """Completes the turn's item with the transcript. Sends nothing if the client has deleted the item."""
        self._current = None
        if not turn.committed:
            intake = self.configuration.intake
            self._committed_ms = intake.received_ms - 1000 * intake.waiting_samples / SAMPLE_RATE  # what was heard
            if turn.announced:
                self._send_detected("speech_stopped", audio_end_ms=turn.end_ms, item_id=turn.id)
            self._commit(turn)
        item = self.conversation.items.get(turn.id)
        if item is None:
            return
        usage = {"type": "duration", "seconds": (turn.end_ms - turn.start_ms) / 1000}
        where = {"item_id": turn.id, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"
        if self.configuration.transcribes:
            self.events.send(f"{kind}.delta", delta=turn.text, **where)
            self.events.send(f"{kind}.completed", transcript=turn.text, usage=usage, **where)
        transcript = turn.text if self.configuration.transcribes else None
        item["content"] = [{"type": "input_audio", "transcript": transcript}]
        item["status"] = "completed"
        self.conversation.finish(item)

    def _commit(self, turn: _UserTurn) -> None:
        """Makes the turn an item of the conversation, without its transcript."""
        turn.committed = True
        self.events.send("input_audio_buffer.committed", item_id=turn.id, previous_item_id=self.conversation.last_id())
        content = [{"type": "input_audio", "transcript": None}]
        item = {"id": turn.id, "object": "realtime.item", "type": "message", "role": "user"}
        self.conversation.add(item | {"status": "in_progress", "content": content})

    def _send_detected(self, name: str, **fields: int | str) -> None:
        if self._detected:
            self.events.send(f"input_audio_buffer.{name}", **fields)
