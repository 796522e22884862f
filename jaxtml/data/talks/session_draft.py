"""A session while it is filled: both voices on one clock, and what is known about them.

`SessionDraft` knows how sound and labels are written on the clock of micro-turns. The scenarios in
`jaxtml.data.talks.timing` decide what is written and when. The gate is the model's decision to speak or to listen in a
micro-turn. It opens where the assistant begins to speak.

Axis glossary: N samples of the session.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from jaxtml.data.talks.edits import Clip
from jaxtml.stream.conversation import Speech, Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

_FADE_OUT = 160  # samples, 10 ms: how the assistant's voice stops when it is interrupted


@dataclass
class SessionDraft:
    """A session that scenarios write user turns and replies into.

    Attributes:
      micro_turns: length of the session.
      user: `[N]` float32, the user's clean voice and noises.
      assistant: `[N]` float32, the assistant's voice.
      free: the first sample at which both sides are done.
      reply_span: first and last sample of the newest reply's words.
      words: the user's words.
      speech: the assistant's stretches of speech.
      typed: `(micro-turn, text)` of what the user typed.
      user_turn_ends_s: end of each user turn in seconds.
      scenarios: names of the scenarios, in order.
      replies: text of each reply, in order and in full.
    """

    micro_turns: int
    user: np.ndarray
    assistant: np.ndarray
    free: int = 0
    reply_span: tuple[int, int] = (0, 0)
    words: list[Word] = field(default_factory=list)
    speech: list[Speech] = field(default_factory=list)
    typed: list[tuple[int, str]] = field(default_factory=list)
    user_turn_ends_s: list[float] = field(default_factory=list)
    scenarios: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)

    @staticmethod
    def silent(micro_turns: int) -> SessionDraft:
        """Returns a session in which nothing is heard yet."""
        samples = micro_turns * MICRO_TURN_SAMPLES
        return SessionDraft(micro_turns, np.zeros(samples, np.float32), np.zeros(samples, np.float32))

    def has_room_for_reply(self, reply: Clip, gate: int) -> bool:
        """Returns whether `reply` ends before the session ends, if the gate opens in micro-turn `gate`."""
        return gate + _micro_turns_of(reply) + 1 <= self.micro_turns

    def place_user_turn(self, clip: Clip, start: int) -> None:
        """Adds a user turn whose first sample is `start`."""
        end = start + len(clip.wave)
        self.user[start:end] += clip.wave
        self.words += [_shift(word, start) for word in clip.words]
        self.user_turn_ends_s.append(end / SAMPLE_RATE)

    def overhear(self, clip: Clip, start: int) -> None:
        """Adds words that nobody says to the assistant, with `start` as their first sample. They end no user turn."""
        end = start + len(clip.wave)
        self.user[start:end] += clip.wave
        self.words += [_shift(word, start) for word in clip.words]
        self.free = max(self.free, end)
        self.reply_span = (end, end)  # the reply before these words can no longer be interrupted

    def place_typed(self, text: str, micro_turn: int) -> None:
        """Adds text that is known when `micro_turn` starts."""
        self.typed.append((micro_turn, text))

    def place_reply(self, reply: Clip, gate: int) -> None:
        """Adds a reply. The gate opens in micro-turn `gate`; the reply is heard one micro-turn later."""
        heard = (gate + 1) * MICRO_TURN_SAMPLES
        self.assistant[heard : heard + len(reply.wave)] = reply.wave
        self.speech.append(Speech(gate, gate + _micro_turns_of(reply), tuple(_shift(w, heard) for w in reply.words)))
        self.replies.append(reply.text)
        self.reply_span = (heard, heard + int(reply.words[-1].end_s * SAMPLE_RATE))
        self.free = heard + len(reply.wave)

    def interrupt_reply(self, start: int) -> None:
        """Stops the newest reply because the user starts to talk at sample `start`.

        The micro-turn of `start` is the last one in which the assistant speaks. Words that the assistant has not
        finished move to `Speech.unsaid`.
        """
        micro_turn = start // MICRO_TURN_SAMPLES
        stop = (micro_turn + 2) * MICRO_TURN_SAMPLES
        speech = self.speech[-1]
        said = sum(word.end_s * SAMPLE_RATE <= stop for word in speech.words)
        self.speech[-1] = replace(
            speech, end_micro_turn=micro_turn + 1, words=speech.words[:said], unsaid=speech.words[said:]
        )
        self.assistant[stop - _FADE_OUT : stop] *= np.linspace(1, 0, _FADE_OUT, dtype=np.float32)
        self.assistant[stop:] = 0


def _micro_turns_of(clip: Clip) -> int:
    return -(-len(clip.wave) // MICRO_TURN_SAMPLES)


def _shift(word: Word, samples: int) -> Word:
    return Word(word.text, word.start_s + samples / SAMPLE_RATE, word.end_s + samples / SAMPLE_RATE)
