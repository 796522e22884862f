"""The records of a session: what one micro-turn (200 ms) takes and gives, and what a whole session gives.

The gate of a micro-turn says whether the model speaks in it (open) or listens (closed). dMel frames are the 16-level
log-mel frames that the model hears (`jaxtml.stream.dmel`).

The engine, the slots and `converse` make and read these records. The server sends `SlotInput` and `SlotOutput` between
processes. Evaluations and the command line read `MicroTurn` and `Reply`. This module imports no JAX.

Axes: N samples at 16 kHz, P patches, n generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control

SILENCE = np.zeros(MICRO_TURN_SAMPLES, np.float32)
SILENCE.setflags(write=False)  # every record without sound shares this array


@dataclass(frozen=True)
class SlotInput:
    """What one session takes in a micro-turn.

    Attributes:
      bins: `[4, 80]` uint8, the dMel frames of what the user says.
      text: token ids; the empty tuple where no text arrives.
      mark: the control token in front of the text. TYPED: the user typed the text. BACKGROUND: anything else, which
        is instructions, tools, an earlier conversation, or results of functions and of the background model. The
        background model is the larger model to which this model delegates requests.
      patches: `[P, 2, 40, 40, 3]` float32, video; None without video.
    """

    bins: np.ndarray
    text: tuple[int, ...] = ()
    mark: Control = Control.TYPED
    patches: np.ndarray | None = None


@dataclass(frozen=True)
class SlotOutput:
    """What one session gives in a micro-turn.

    Attributes:
      wave: `[3200]` float32 at 16 kHz. The user hears these samples one micro-turn later.
      tokens: `[n]` int32, the generated tokens. The last token is the gate, SPEAK or LISTEN.
      speaking: whether the gate is open.
      p_speak: probability that the gate opens: P(SPEAK) / (P(SPEAK) + P(LISTEN)).
    """

    wave: np.ndarray
    tokens: np.ndarray
    speaking: bool
    p_speak: float


@dataclass(frozen=True)
class MicroTurn:
    """One micro-turn of one session, in words.

    Attributes:
      t_ms: when the input of the micro-turn began, in milliseconds since the session began.
      gate: "speak" or "listen".
      p_speak: probability that the gate opens: P(SPEAK) / (P(SPEAK) + P(LISTEN)).
      heard: the text that this micro-turn added to the transcript of the user.
      text: the text that this micro-turn added to what the model says.
      delegate: the text that this micro-turn added to a request to the background model.
      step_ms: how long the computation took, in milliseconds.
      wave: `[3200]` float32 at 16 kHz, what the model says. The user hears it in `[t_ms + 200, t_ms + 400)`.
    """

    t_ms: int
    gate: str
    p_speak: float
    heard: str
    text: str
    delegate: str
    step_ms: float
    wave: np.ndarray = field(default_factory=lambda: SILENCE, repr=False, compare=False)

    def event(self) -> dict[str, int | float | str]:
        """Returns the fields without the sound, as a JSON object of an events file."""
        return {name: value for name, value in vars(self).items() if name != "wave"}


@dataclass(frozen=True)
class Reply:
    """What one session gave.

    Attributes:
      wave: `[N]` float32 at 16 kHz, as long as the session's input. Sample i is heard at the time of input sample i.
      turns: one record per micro-turn.
    """

    wave: np.ndarray
    turns: tuple[MicroTurn, ...]

    @classmethod
    def join(cls, micro_turns: Sequence[MicroTurn], samples: int) -> Reply:
        """Joins the micro-turns of a session whose input had `samples` samples.

        The waves of the result's records are views of one array, so that the sound is in memory only once.
        """
        wave = np.concatenate([SILENCE, *(micro_turn.wave for micro_turn in micro_turns)])
        starts = range(MICRO_TURN_SAMPLES, len(wave), MICRO_TURN_SAMPLES)
        records = (
            replace(micro_turn, wave=wave[start : start + MICRO_TURN_SAMPLES])
            for micro_turn, start in zip(micro_turns, starts, strict=True)
        )
        return cls(wave[:samples], tuple(records))

    @property
    def heard(self) -> str:
        """The transcript of the user, with single spaces."""
        return " ".join("".join(micro_turn.heard for micro_turn in self.turns).split())

    @property
    def text(self) -> str:
        """What the model said, with single spaces."""
        return " ".join("".join(micro_turn.text for micro_turn in self.turns).split())
