"""Training examples that a person can check: a stereo WAV, a picture and a few lines of text each.

Left is what the microphone hears, right is the assistant. Called by `jaxtml data --show`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.dmel import log_mel
from jaxtml.stream.timebase import DMEL_HOP, LOG_MEL_MAX, LOG_MEL_MIN, MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE

_PAUSE_S = 0.38  # a gap between two words of one turn from here on is a pause
_USER, _OWN, _TAKEOVER, _PAUSE = "tab:blue", "tab:green", "tab:red", "gold"


def takeovers(conversation: Conversation) -> list[tuple[float, float]]:
    """`(end_s, heard_s)` for each turn of the user that is answered: its end, and when the answer is first heard."""
    heard = [(speech.start_micro_turn + 1) * MICRO_TURN_SAMPLES / SAMPLE_RATE for speech in conversation.speech]
    pairs = []
    for end in conversation.user_end_s:
        later = [start for start in heard if start > end]
        if later:
            pairs.append((end, min(later)))
    return pairs


def user_turns(conversation: Conversation) -> list[tuple[Word, ...]]:
    """The user's words, one tuple for each turn."""
    turns, words = [], list(conversation.user_words)
    for end in conversation.user_end_s:
        turns.append(tuple(word for word in words if word.end_s <= end + 1e-3))
        words = words[len(turns[-1]) :]
    return [*turns, tuple(words)] if words else turns


def pauses(conversation: Conversation) -> list[tuple[float, float]]:
    """`(from_s, to_s)` of each pause inside a turn of the user."""
    return [
        (before.end_s, after.start_s)
        for turn in user_turns(conversation)
        for before, after in zip(turn, turn[1:], strict=False)
        if after.start_s - before.end_s >= _PAUSE_S
    ]


def summary(conversation: Conversation) -> str:
    """Who says what and when, one line each, in order."""
    lines: list[tuple[float, str]] = []
    for turn in user_turns(conversation):
        lines.append((turn[0].start_s, f"user       {' '.join(word.text for word in turn)}"))
    for start, end in pauses(conversation):
        lines.append((start, f"           (pauses for {end - start:.2f} s)"))
    for end, heard in takeovers(conversation):
        lines.append((end, f"           (taken over after {1000 * (heard - end):.0f} ms)"))
    for speech in conversation.speech:
        start = (speech.start_micro_turn + 1) * MICRO_TURN_MS / 1000
        stop = (speech.end_micro_turn + 1) * MICRO_TURN_MS / 1000
        lines.append((start, f"assistant  {' '.join(word.text for word in speech.words)}   (silent from {stop:.1f} s)"))
    seconds = len(conversation.user) / SAMPLE_RATE
    head = (
        f"{conversation.scenario}; {seconds:.1f} s, {len(conversation.speech)} replies, "
        f"session clock {conversation.clock_s:.0f} s\nright replies: {conversation.expected or '(silence)'}"
    )
    return "\n".join([head, *(f"{at:6.2f}  {line}" for at, line in sorted(lines, key=lambda item: item[0]))])


def _spectrogram(axes: Axes, wave: np.ndarray, words: list[Word], colour: str, title: str) -> None:
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
        height = 84 + 9 * (n % 3)  # neighbours on different lines, so that they do not cover each other
        axes.plot([word.start_s, word.end_s], [81, 81], color=colour, linewidth=3, clip_on=False)
        axes.text(
            (word.start_s + word.end_s) / 2, height, word.text, color=colour, ha="center", va="bottom", fontsize=8
        )
    axes.set_ylim(0, 82)
    axes.set_ylabel(title)
    axes.set_yticks([])


def _envelope(axes: Axes, wave: np.ndarray, colour: str, sign: int) -> None:
    """The peak of each 5 ms, upwards or downwards."""
    peaks = np.abs(wave[: len(wave) // 80 * 80].reshape(-1, 80)).max(axis=1)
    axes.fill_between(np.arange(len(peaks)) * 80 / SAMPLE_RATE, 0, sign * peaks, color=colour, linewidth=0)


def draw(conversation: Conversation, title: str) -> Figure:
    """Both voices on the 200 ms grid: waveforms, spectrograms, words, gate, takeovers and pauses."""
    seconds = len(conversation.user) / SAMPLE_RATE
    figure = Figure(figsize=(max(10.0, 1.25 * seconds), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    waves, user, own, gate = figure.subplots(4, 1, sharex=True, height_ratios=(3, 4, 4, 1))
    _envelope(waves, conversation.user, _USER, 1)
    _envelope(waves, conversation.assistant, _OWN, -1)
    waves.set_ylim(-1, 1)
    waves.set_ylabel("user up\nassistant down")
    _spectrogram(user, conversation.user, list(conversation.user_words), _USER, "user")
    said = [word for speech in conversation.speech for word in speech.words]
    _spectrogram(own, conversation.assistant, said, _OWN, "assistant")
    for speech in conversation.speech:
        start, end = speech.start_micro_turn * MICRO_TURN_MS / 1000, speech.end_micro_turn * MICRO_TURN_MS / 1000
        gate.broken_barh([(start, end - start)], (0, 1), facecolors=_OWN)
    gate.set_ylim(0, 1)
    gate.set_yticks([])
    gate.set_ylabel("gate")
    gate.set_xlabel("seconds; thin lines are micro-turns; the gate's output is heard one micro-turn later")
    for axes in (waves, user, own, gate):
        for start, end in pauses(conversation):
            axes.axvspan(start, end, color=_PAUSE, alpha=0.35, linewidth=0)
        for end, heard in takeovers(conversation):
            axes.axvline(end, color=_TAKEOVER, linewidth=1.2)
            axes.axvline(heard, color=_TAKEOVER, linewidth=1.2, linestyle="--")
        axes.set_xticks(np.arange(0, seconds + 1e-6, 1))
        axes.set_xticks(np.arange(0, seconds + 1e-6, MICRO_TURN_MS / 1000), minor=True)
        axes.grid(True, axis="x", which="minor", linewidth=0.3, alpha=0.6)
        axes.grid(True, axis="x", which="major", linewidth=0.8, alpha=0.6)
    for end, heard in takeovers(conversation):
        waves.text(heard, 0.98, f" {1000 * (heard - end):.0f} ms", color=_TAKEOVER, va="top", fontsize=8)
    waves.set_xlim(0, seconds)
    figure.suptitle(f"{title}: {conversation.scenario}", fontsize=11)
    return figure


def write_example(conversation: Conversation, folder: Path, name: str) -> str:
    """Write `name`.wav, .png and .txt into `folder`; gives the text."""
    folder.mkdir(parents=True, exist_ok=True)
    stereo = np.stack([conversation.user, conversation.assistant], axis=1)
    soundfile.write(folder / f"{name}.wav", stereo, SAMPLE_RATE, subtype="PCM_16")
    draw(conversation, name).savefig(folder / f"{name}.png", dpi=80)
    text = summary(conversation)
    (folder / f"{name}.txt").write_text(text + "\n")
    return text


def write_examples(conversations: Iterator[Conversation], folder: Path, count: int) -> Iterator[str]:
    """Write the first `count` conversations as example_0 ...; gives each one's text as soon as it is written."""
    for n, conversation in zip(range(count), conversations, strict=False):
        yield f"example_{n}: " + write_example(conversation, folder, f"example_{n}")
