"""A two-channel conversation with everything that is known about it: what data makers build and the layout encodes.

Times are seconds on the clock of the recording; both waveforms share it and have the same length. Called by
`jaxtml.data` (which makes conversations) and `jaxtml.stream.layout` (which turns them into tokens and back).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Word:
    """One spoken word: its text and where it is heard, in seconds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Speech:
    """One stretch in which the assistant speaks.

    The stretch starts and ends at micro-turn edges: the output of micro-turns `[start_turn, end_turn)`, heard one
    micro-turn later. `words` carry absolute times on the conversation's clock. Words that an interruption cut off are
    in `unsaid` with the times that they would have had: text is written before it is said.
    """

    start_turn: int
    end_turn: int
    words: tuple[Word, ...]
    unsaid: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What both sides said, and when.

    Attributes:
      user: `[N]` float32, what the microphone hears (speech, noise, room), 16 kHz; N is a whole number of micro-turns.
      assistant: `[N]` float32, the assistant's clean voice on the same clock (silence outside `speech`).
      user_words: the user's words in order of their end, as they should be transcribed.
      speech: the assistant's stretches of speech, in order, not overlapping.
      typed: `(turn, text)`: text that the user typed, known at the start of that micro-turn.
      frames: `(turn, [2, H, W, 3] uint8)`: video known at the start of that micro-turn.
      clock_s: seconds since the session began at the first sample (a conversation may be cut from a longer session).
      wall_clock_s: seconds since the epoch at the first sample.
      scenario: which scenario it was made from; for evaluation and inspection.
      expected: for evaluation: the reply text that is right, or "" where silence is right.
      user_end_s: ends of the user's complete turns, in seconds; for the gate's latency.
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
