"""Writes training examples that a person can check: a stereo WAV, a picture and a few lines of text each.

The left channel is what the microphone hears, the right channel is the assistant. Called by `jaxtml data --show`.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.dmel import log_mel
from jaxtml.stream.timebase import DMEL_HOP, LOG_MEL_MAX, LOG_MEL_MIN, MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE

_MIN_PAUSE_S = 0.38  # a gap between two words of a user turn that is at least this long is a pause
_WORDS: Any = {"fontsize": 8, "parse_math": False}  # a text with two dollar signs would be read as a formula
_USER_COLOUR, _ASSISTANT_COLOUR, _TAKEOVER_COLOUR, _PAUSE_COLOUR = "tab:blue", "tab:green", "tab:red", "gold"


def takeovers(conversation: Conversation) -> list[tuple[float, float]]:
    """Returns `(end_s, heard_s)` of each takeover, in seconds.

    A takeover is the change from a user turn to its answer. The user turn ends at `end_s`. The answer is first heard at
    `heard_s`.
    """
    heard = [(speech.start_micro_turn + 1) * MICRO_TURN_SAMPLES / SAMPLE_RATE for speech in conversation.speech]
    pairs = []
    for end in conversation.user_end_s:
        later = [start for start in heard if start > end]
        if later:
            pairs.append((end, min(later)))
    return pairs


def user_turns(conversation: Conversation) -> list[tuple[Word, ...]]:
    """Returns the user's words, one tuple for each user turn."""
    turns, remaining = [], list(conversation.user_words)
    for end in conversation.user_end_s:
        turns.append(tuple(word for word in remaining if word.end_s <= end + 1e-3))
        remaining = remaining[len(turns[-1]) :]
    return [*turns, tuple(remaining)] if remaining else turns


def pauses(conversation: Conversation) -> list[tuple[float, float]]:
    """Returns `(start_s, end_s)` of each pause inside a user turn."""
    return [
        (before.end_s, after.start_s)
        for user_turn in user_turns(conversation)
        for before, after in pairwise(user_turn)
        if after.start_s - before.end_s >= _MIN_PAUSE_S
    ]


def summary(conversation: Conversation) -> str:
    """Returns a text that says who speaks when, one line for each event, in order."""
    lines: list[tuple[float, str]] = []
    for user_turn in user_turns(conversation):
        lines.append((user_turn[0].start_s, f"user       {' '.join(word.text for word in user_turn)}"))
    for start, end in pauses(conversation):
        lines.append((start, f"           (pauses for {end - start:.2f} s)"))
    for end, heard in takeovers(conversation):
        lines.append((end, f"           (answered after {1000 * (heard - end):.0f} ms)"))
    for speech in conversation.speech:
        start = (speech.start_micro_turn + 1) * MICRO_TURN_MS / 1000
        stop = (speech.end_micro_turn + 1) * MICRO_TURN_MS / 1000
        lines.append((start, f"assistant  {' '.join(word.text for word in speech.words)}   (silent from {stop:.1f} s)"))
    seconds = len(conversation.user) / SAMPLE_RATE
    head = (
        f"{conversation.scenario}; {seconds:.1f} s, {len(conversation.speech)} replies, "
        f"session clock {conversation.clock_s:.0f} s\nright replies: {conversation.expected or '(silence)'}"
    )
    in_order = sorted(lines, key=lambda line: line[0])
    return "\n".join([head, *(f"{start_s:6.2f}  {text}" for start_s, text in in_order)])


def _draw_spectrogram(axes: Axes, wave: np.ndarray, words: list[Word], colour: str, title: str) -> None:
    """Draws the log-mels of `[N]` with the words above them."""
    frames = log_mel(wave)
    axes.imshow(
        frames.T,
        origin="lower",
        aspect="auto",
        cmap="Greys",
        vmin=LOG_MEL_MIN + 2,
        vmax=LOG_MEL_MAX,
        extent=(0, len(frames) * DMEL_HOP / SAMPLE_RATE, 0, 80),
    )
    for n, word in enumerate(words):
        height = 84 + 9 * (n % 3)  # Neighbours stand on different lines, so that they do not cover each other.
        axes.plot([word.start_s, word.end_s], [81, 81], color=colour, linewidth=3, clip_on=False)
        axes.text((word.start_s + word.end_s) / 2, height, word.text, color=colour, ha="center", va="bottom", **_WORDS)
    axes.set_ylim(0, 82)
    axes.set_ylabel(title)
    axes.set_yticks([])


def _draw_envelope(axes: Axes, wave: np.ndarray, colour: str, sign: int) -> None:
    """Draws the peak of each 5 ms of `[N]`, upwards (sign 1) or downwards (sign -1)."""
    peaks = np.abs(wave[: len(wave) // 80 * 80].reshape(-1, 80)).max(axis=1)
    axes.fill_between(np.arange(len(peaks)) * 80 / SAMPLE_RATE, 0, sign * peaks, color=colour, linewidth=0)


def _draw_gate(axes: Axes, conversation: Conversation) -> None:
    """Draws a bar for each stretch of micro-turns in which the assistant speaks.

    The gate is the model's decision, in each micro-turn, to speak or to listen.
    """
    for speech in conversation.speech:
        start_s, end_s = speech.start_micro_turn * MICRO_TURN_MS / 1000, speech.end_micro_turn * MICRO_TURN_MS / 1000
        axes.broken_barh([(start_s, end_s - start_s)], (0, 1), facecolors=_ASSISTANT_COLOUR)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel("gate")
    axes.set_xlabel("seconds; thin lines are micro-turns; the gate's output is heard one micro-turn later")


def _mark_events(axes: Axes, conversation: Conversation) -> None:
    """Marks pauses as areas, and each takeover as two lines: the end of the user turn and the start of the answer."""
    for start_s, end_s in pauses(conversation):
        axes.axvspan(start_s, end_s, color=_PAUSE_COLOUR, alpha=0.35, linewidth=0)
    for end_s, heard_s in takeovers(conversation):
        axes.axvline(end_s, color=_TAKEOVER_COLOUR, linewidth=1.2)
        axes.axvline(heard_s, color=_TAKEOVER_COLOUR, linewidth=1.2, linestyle="--")


def draw(conversation: Conversation, title: str) -> Figure:
    """Returns a picture of both voices on the 200 ms grid.

    It shows waveforms, spectrograms, words, the gate, takeovers and pauses.
    """
    seconds = len(conversation.user) / SAMPLE_RATE
    figure = Figure(figsize=(max(10.0, 1.25 * seconds), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    waves, user, assistant, gate = figure.subplots(4, 1, sharex=True, height_ratios=(3, 4, 4, 1))
    _draw_envelope(waves, conversation.user, _USER_COLOUR, 1)
    _draw_envelope(waves, conversation.assistant, _ASSISTANT_COLOUR, -1)
    waves.set_ylim(-1, 1)
    waves.set_ylabel("user up\nassistant down")
    _draw_spectrogram(user, conversation.user, list(conversation.user_words), _USER_COLOUR, "user")
    assistant_words = [word for speech in conversation.speech for word in speech.words]
    _draw_spectrogram(assistant, conversation.assistant, assistant_words, _ASSISTANT_COLOUR, "assistant")
    _draw_gate(gate, conversation)
    for axes in (waves, user, assistant, gate):
        _mark_events(axes, conversation)
        axes.set_xticks(np.arange(0, seconds + 1e-6, 1))
        axes.set_xticks(np.arange(0, seconds + 1e-6, MICRO_TURN_MS / 1000), minor=True)
        axes.grid(True, axis="x", which="minor", linewidth=0.3, alpha=0.6)
        axes.grid(True, axis="x", which="major", linewidth=0.8, alpha=0.6)
    for end_s, heard_s in takeovers(conversation):
        latency = f" {1000 * (heard_s - end_s):.0f} ms"
        waves.text(heard_s, 0.98, latency, color=_TAKEOVER_COLOUR, va="top", fontsize=8)
    waves.set_xlim(0, seconds)
    figure.suptitle(f"{title}: {conversation.scenario}", fontsize=11)
    return figure


def write_example(conversation: Conversation, folder: Path, name: str) -> str:
    """Writes `name`.wav, `name`.png and `name`.txt into `folder`. Returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    stereo = np.stack([conversation.user, conversation.assistant], axis=1)
    soundfile.write(folder / f"{name}.wav", stereo, SAMPLE_RATE, subtype="PCM_16")
    draw(conversation, name).savefig(folder / f"{name}.png", dpi=80)
    text = summary(conversation)
    (folder / f"{name}.txt").write_text(text + "\n")
    return text


def write_examples(conversations: Iterator[Conversation], folder: Path, count: int) -> Iterator[str]:
    """Writes the first `count` conversations as example_0 and so on. Yields the text of each once it is written."""
    for n, conversation in zip(range(count), conversations, strict=False):
        yield f"example_{n}: " + write_example(conversation, folder, f"example_{n}")
