"""`Summary`: one session in figures, and in one line for a person. `jaxtml converse` prints it.

Axis: N samples at 16 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxtml.session.records import Reply
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE


@dataclass(frozen=True)
class Summary:
    """One session in figures. The field names are those of `jaxtml converse --json`.

    Attributes:
      seconds: length of the recording.
      heard: transcript of the user.
      said: what the model said.
      replies: how often the model began to speak.
      gate_latency_ms: per reply, the time from the user's last loud sample before it to the first sample of the reply.
        Loudness decides when the user stopped speaking, because nothing else is known about a recording. A reply before
        any loud sample has no latency.
      step_ms_median: median time of a micro-turn's computation.
      step_ms_max: longest time of a micro-turn's computation.
      late_turns: number of micro-turns whose computation took longer than 200 ms, the length of a micro-turn.
    """

    seconds: float
    heard: str
    said: str
    replies: int
    gate_latency_ms: tuple[int, ...]
    step_ms_median: float
    step_ms_max: float
    late_turns: int

    def sentence(self) -> str:
        """Returns what happened, in one line. If the model said nothing, the line says what to try."""
        steps = (
            f"computing each 200 ms took {self.step_ms_median:.0f} ms "
            f"(median; at most {self.step_ms_max:.0f} ms; {self.late_turns} took more than 200 ms)"
        )
        heard = f"heard {self.heard!r}" if self.heard else "heard no words"
        if not self.replies:
            return f"{self.seconds} s: {heard}, said nothing; {steps}. Leave two seconds of silence after the question."
        replies = f"said {self.said!r} in {self.replies} " + ("reply" if self.replies == 1 else "replies")
        latency = ", ".join(f"{ms} ms" for ms in self.gate_latency_ms)
        began = f", which began {latency} after the user stopped" if latency else ""
        return f"{self.seconds} s: {heard}, {replies}{began}; {steps}."


def summarise(wave: np.ndarray, reply: Reply) -> Summary:
    """Returns the figures of a session. `wave` `[N]` float32 is the user's recording."""
    steps = np.array([micro_turn.step_ms for micro_turn in reply.turns])
    speaking = [micro_turn.gate == "speak" for micro_turn in reply.turns]
    openings = [i for i, speaks in enumerate(speaking) if speaks and (i == 0 or not speaking[i - 1])]
    latencies = [latency for i in openings if (latency := _latency_ms(wave, i)) is not None]
    return Summary(
        seconds=round(len(wave) / SAMPLE_RATE, 2),
        heard=reply.heard,
        said=reply.text,
        replies=len(openings),
        gate_latency_ms=tuple(latencies),
        step_ms_median=float(np.median(steps)),
        step_ms_max=float(steps.max()),
        late_turns=int((steps > MICRO_TURN_MS).sum()),
    )


def _latency_ms(wave: np.ndarray, micro_turn: int) -> int | None:
    """Returns the time from the user's last loud 10 ms to the first sound of a reply; None if the user was not loud.

    The model begins to speak in `micro_turn`, and the user hears its sound one micro-turn later. A block of 10 ms is
    loud if its level exceeds the sum of two values: a tenth of the recording's level, and a tenth of the level of the
    loudest block.
    """
    block = SAMPLE_RATE // 100
    audible = (micro_turn + 1) * MICRO_TURN_SAMPLES
    blocks = wave[: min(audible, len(wave)) // block * block].reshape(-1, block)
    level = np.sqrt((blocks**2).mean(axis=1))
    loud = np.flatnonzero(level > 0.1 * np.sqrt((wave**2).mean()) + 0.1 * level.max(initial=0.0))
    return None if not len(loud) else round((audible - (loud[-1] + 1) * block) * 1000 / SAMPLE_RATE)
