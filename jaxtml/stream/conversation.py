"""A two-channel conversation with everything that is known about it.

`jaxtml.data` makes conversations, `jaxtml.stream.encoding` turns them into tokens, and the evaluations compare a
model's behaviour with them. Times are seconds on the clock of the recording. Both waveforms share that clock and have
the same length. A micro-turn is 200 ms (`jaxtml.stream.timebase`).

Axes: N samples, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Word:
    """One spoken word.

    Attributes:
      text: the word, lower case.
      start_s, end_s: where it is heard, in seconds.
    """

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Speech:
    """One stretch of micro-turns in which the assistant speaks.

    The stretch starts and ends at micro-turn edges. It is the output of the micro-turns
    `[start_micro_turn, end_micro_turn)`, which is heard one micro-turn later.

    Attributes:
      start_micro_turn, end_micro_turn: the stretch.
      words: the words that are heard, with times on the clock of the conversation.
      unsaid: words that an interruption cut off, with the times that they would have had. They are kept because the
        model writes the text of its words before it says them.
    """

    start_micro_turn: int
    end_micro_turn: int
    words: tuple[Word, ...]
    unsaid: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What both sides say, and when.

    Attributes:
      user: `[N]` float32, what the microphone hears (speech, noise, room) at 16 kHz. N is a whole number of
        micro-turns.
      assistant: `[N]` float32, the assistant's clean voice on the same clock; silence outside `speech`.
      user_words: the user's words as they should be transcribed, in the order of their ends.
      speech: the assistant's stretches of speech, in order. They do not overlap.
      typed: `(micro-turn, text)` of what the user typed. The text is known when the micro-turn starts.
      frames: `(micro-turn, [2, H, W, 3] uint8)` of the video: two frames, 100 ms before the micro-turn starts and at
        its start.
      clock_s: seconds since the session began, at the first sample. A conversation may be cut from a longer session.
      wall_clock_s: seconds since the Unix epoch, at the first sample.
      scenario: for evaluation and inspection, the names of the scenarios that the conversation was made from, with
        spaces between them. A scenario is a rule for when each side is heard (`jaxtml.data.talks.timing`).
      expected: for evaluation, the texts of the right replies, with " | " between them; "" where silence is right.
      user_end_s: end of each complete user turn, in seconds. The latency of the reply is measured from there.
    """

    user: np.ndarray
    assistant: np.ndarray
    user_words: tuple[Word, ...] = ()
    speech: tuple[Speech, ...] = ()
    typed: tuple[tuple[int, str], ...] = ()
    frames: tuple[tuple[int, np.ndarray], ...] = field(default=())
    clock_s: float = 0.0
    wall_clock_s: float = 0.0
    scenario: str = ""
    expected: str = ""
    user_end_s: tuple[float, ...] = ()
