"""The line of phonemes that a neural voice reads, and the time at which each of its words starts.

Called by `kokoro` and `piper`. Both voices read eSpeak's phonemes and report how long each token lasts.

Axis glossary: T tokens of the line.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxtml.data.voices import espeak
from jaxtml.data.voices.utterance import tokens_of


def phoneme_line(text: str, accent: str, spell: Callable[[str], str]) -> tuple[str, list[int]]:
    """Returns the characters that a neural voice reads, and the index at which each word begins.

    eSpeak turns words into phonemes clause by clause. One space separates words. Punctuation follows its word. A text
    without a final punctuation mark gets a full stop, because the voice would trail off without one.

    Args:
      text: English, numbers as words.
      accent: eSpeak's name of the accent, such as `en-us`.
      spell: maps the IPA of one word to the letters that the model was trained on.
    """
    tokens = tokens_of(text)
    if tokens[-1].isalpha() or tokens[-1].endswith("'"):
        tokens.append(".")
    line, begins, clause = "", [], []
    for token in tokens:
        if token[0].isalpha():
            clause.append(token)
            continue
        for word in espeak.phonemes(clause, accent) if clause else ():
            line += " " if line else ""
            begins.append(len(line))
            line += spell(word)
        line += token
        clause = []
    return line, begins


def starts_from_durations(durations_s: np.ndarray, begins: list[int], early_s: float) -> tuple[float, ...]:
    """Returns the start of each word in seconds.

    The sound runs ahead of the tokens. The token in front of a word's first token is a space. The word is heard
    `early_s` before the start of this space. `early_s` was measured per engine on 130 words that start with s, because
    a spectrogram shows the onset of an s within 5 ms.

    Args:
      durations_s: `[T]` seconds that each token lasts.
      begins: index of the token at which each word begins.
      early_s: seconds by which the sound runs ahead.
    """
    ends = np.concatenate([[0.0], np.cumsum(durations_s)])
    return tuple(max(0.0, float(ends[begin - 1]) - early_s) for begin in begins)
