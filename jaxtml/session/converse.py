"""`converse` and `replies`: sessions over waveforms that are known from the beginning, side by side.

Called by `jaxtml.train.samples`, by `jaxtml.evals.run` and by tests. The model hears each waveform in micro-turns of
200 ms, as it would hear a microphone. So later samples never change an earlier output.

Axes: N samples at 16 kHz, P patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxtml.model.duplex.state import MicroTurnOutputs
from jaxtml.session.batch import SessionBatch, SessionInput
from jaxtml.session.engine import Engine
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream.text_plan import plan_typed
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES


def micro_turns_of(samples: int) -> int:
    """Returns the number of micro-turns that `samples` samples need. The samples may fill the last one only in part."""
    return -(-samples // MICRO_TURN_SAMPLES)


def converse(
    engine: Engine,
    waves: Sequence[np.ndarray],
    seed: int = 0,
    week_ms: int = 0,
    patches: Sequence[np.ndarray] | None = None,
    typed: Sequence[Sequence[tuple[int, str]]] | None = None,
) -> Iterator[tuple[MicroTurnOutputs, tuple[MicroTurn, ...]]]:
    """Runs one session per wave, side by side, a micro-turn at a time.

    Args:
      engine: the loaded model.
      waves: `[N]` float32 each. Shorter waves end in silence.
      seed: of the sampling.
      week_ms: wall clock at the beginning, in milliseconds since Monday, 00:00 UTC.
      patches: `[P, 2, 40, 40, 3]` float32 per micro-turn, for the micro-turns that have video. All sessions see them.
      typed: per session, pairs `(micro-turn, text)`: the text that the user types, and the index of the micro-turn in
        which the model gets it. Text that does not fit into its micro-turn goes on in the next.

    Yields:
      The outputs as host arrays, and one record per session.
    """
    micro_turns = micro_turns_of(max(map(len, waves)))
    padded = [np.pad(wave, (0, micro_turns * MICRO_TURN_SAMPLES - len(wave))) for wave in waves]
    plans = [plan_typed(texts, engine.codec, engine.config.duplex, micro_turns) for texts in typed or [()] * len(waves)]
    sessions = SessionBatch(engine, len(waves), seed, week_ms)
    for index in range(micro_turns):
        samples = slice(index * MICRO_TURN_SAMPLES, (index + 1) * MICRO_TURN_SAMPLES)
        seen = patches[index] if patches is not None and index < len(patches) else None
        yield sessions.step(
            [
                SessionInput(wave[samples], tuple(plan[index]), patches=seen)
                for wave, plan in zip(padded, plans, strict=True)
            ]
        )


def replies(
    engine: Engine,
    waves: Sequence[np.ndarray],
    seed: int = 0,
    typed: Sequence[Sequence[tuple[int, str]]] | None = None,
) -> list[Reply]:
    """Runs whole sessions side by side. Arguments: see `converse`.

    A reply is as long as its wave. Sample i of the reply is heard at the time of sample i of the wave.
    """
    records = [records for _, records in converse(engine, waves, seed, typed=typed)]
    return [
        Reply.join([micro_turn[i] for micro_turn in records[: micro_turns_of(len(wave))]], len(wave))
        for i, wave in enumerate(waves)
    ]
