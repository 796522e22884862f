"""`jaxtml converse`: a full-duplex session over a recording, micro-turn by micro-turn, and what came of it.

Reads the recording whole, then feeds the engine as a microphone would, at real-time pace if asked. Writes the reply on
the clock of the input, events, a stereo file and a picture.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtml.errors import InputError
from jaxtml.session.engine import Engine, MicroTurn, Reply, converse
from jaxtml.stream.audio_file import read_audio, write_wav
from jaxtml.stream.images import image_patches
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.stream.video_file import read_frame_pairs

NOON_MS = 12 * 3_600_000
"""Monday noon: a recording has no wall clock of its own, and the reply is a function of recording and seed alone."""

WIDEST = 160.0  # inches of a picture, two minutes: longer sessions are squeezed into it


@dataclasses.dataclass(frozen=True)
class Summary:
    """One session in figures.

    `gate_latency_ms` is, per reply, the time from the last loud sample of the user before it to its first sample (the
    user's end is judged by level here, as nothing else is known of a recording).
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
        """What happened, in one line, and what to try where nothing did."""
        steps = f"{self.step_ms_median:.0f} ms per micro-turn (most {self.step_ms_max:.0f}, late {self.late_turns})"
        heard = f"heard {self.heard!r}" if self.heard else "heard no words"
        if not self.replies:
            return f"{self.seconds} s: {heard}, said nothing; {steps}. Leave two seconds of silence after the question."
        latency = ", ".join(f"{ms} ms" for ms in self.gate_latency_ms)
        return f"{self.seconds} s: {heard}, said {self.said!r}, first sound {latency} after the user; {steps}."


def run(
    engine: Engine,
    wave: np.ndarray,
    *,
    seed: int = 0,
    video: str | Path | None = None,
    realtime: bool = False,
    on_turn: Callable[[MicroTurn], None] = lambda record: None,
) -> Reply:
    """Holds the session; `on_turn` is called after each micro-turn, at the pace of the clock where `realtime`."""
    turns = -(-len(wave) // MICRO_TURN_SAMPLES)
    patches = None
    if video is not None:
        most = engine.config.duplex.max_patches
        if not most:
            raise InputError(f"--video: the checkpoint {engine.config.name!r} takes no video (duplex.max_patches is 0)")
        patches = [image_patches(pair) for pair in read_frame_pairs(video, turns, most)]
    chunks, records = [np.zeros(MICRO_TURN_SAMPLES, np.float32)], []
    engine.step(1)
    began = time.monotonic()
    for outputs, (record,) in converse(engine, [wave], seed, NOON_MS, patches):
        chunks.append(np.asarray(outputs.wave[0]))
        records.append(record)
        on_turn(record)
        if realtime:
            time.sleep(max(0.0, began + len(records) * MICRO_TURN_MS / 1000 - time.monotonic()))
    return Reply(np.concatenate(chunks)[: len(wave)], tuple(records))


def summarise(wave: np.ndarray, reply: Reply) -> Summary:
    steps = np.array([turn.step_ms for turn in reply.turns])
    openings = [
        i
        for i, turn in enumerate(reply.turns)
        if turn.gate == "speak" and (i == 0 or reply.turns[i - 1].gate != "speak")
    ]
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


def _latency_ms(wave: np.ndarray, turn: int) -> int | None:
    """From the user's last loud 10 ms before the reply of micro-turn `turn` is heard, to that moment."""
    block = SAMPLE_RATE // 100
    audible = (turn + 1) * MICRO_TURN_SAMPLES
    blocks = wave[: min(audible, len(wave)) // block * block].reshape(-1, block)
    level = np.sqrt((blocks**2).mean(axis=1))
    loud = np.flatnonzero(level > 0.1 * np.sqrt((wave**2).mean()) + 0.1 * level.max(initial=0.0))
    return None if not len(loud) else round((audible - (loud[-1] + 1) * block) * 1000 / SAMPLE_RATE)


def write_events(path: str | Path, reply: Reply) -> None:
    """One JSON line per micro-turn: `t_ms, gate, p_speak, heard, text, delegate, step_ms`."""
    try:
        Path(path).write_text("".join(json.dumps(dataclasses.asdict(turn)) + "\n" for turn in reply.turns))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def read_recording(path: str | Path) -> np.ndarray:
    """`[N]` float32 at 16 kHz, at least one micro-turn. Raises `InputError` as `read_audio` does."""
    wave = read_audio(path)
    if len(wave) < MICRO_TURN_SAMPLES:
        raise InputError(f"{path} lasts {len(wave) * 1000 // SAMPLE_RATE} ms: a micro-turn needs {MICRO_TURN_MS}")
    return wave


def write_stereo(path: str | Path, wave: np.ndarray, reply: Reply) -> None:
    """User left, model right."""
    write_wav(path, np.stack([wave, reply.wave], axis=1))


def draw(path: str | Path, wave: np.ndarray, reply: Reply) -> None:
    """A PNG of the session: both voices on the micro-turn grid, what was heard and said, the gate, time per step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds = len(wave) / SAMPLE_RATE
    width = min(max(9.0, seconds * 1.3), WIDEST)
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(width, 6.0), height_ratios=[2, 2, 1], layout="constrained")
    clock = np.arange(len(wave)) / SAMPLE_RATE
    for axis, sound, name, colour in ((axes[0], wave, "user", "#33658a"), (axes[1], reply.wave, "model", "#bc4b51")):
        axis.plot(clock, sound, linewidth=0.4, color=colour)
        axis.set_ylabel(name)
        axis.set_ylim(-1.4, 1.4)
        axis.set_yticks([])
    for turn in reply.turns:
        start = turn.t_ms / 1000
        if turn.heard:
            axes[0].text(start + 0.2, 1.05, turn.heard.strip(), fontsize=9, color="#33658a")
        if turn.text:
            axes[1].text(start + 0.2, 1.05, turn.text.strip(), fontsize=9, color="#bc4b51")
        if turn.gate == "speak":
            axes[1].axvspan(start + 0.2, start + 0.4, color="#bc4b51", alpha=0.12, linewidth=0)
    at = np.array([turn.t_ms for turn in reply.turns]) / 1000
    axes[2].bar(at, [turn.step_ms for turn in reply.turns], width=0.18, align="edge", color="#7a7a7a")
    axes[2].set_ylabel("step, ms")
    axes[2].set_xlabel("seconds; words stand where their micro-turn ends; shaded: the gate is open")
    axes[0].set_xlim(0, seconds)
    for axis in axes if width < WIDEST else ():  # beyond, a micro-turn is too narrow for a line of its own
        axis.set_xticks(np.arange(0, seconds, 0.2), minor=True)
        axis.grid(which="minor", axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)
