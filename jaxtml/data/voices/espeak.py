"""eSpeak NG through ctypes: about a hundred voice variants in several English accents, word times, and phonemes.

The library (package espeakng-loader, GPL-3) is a tool that is used while data is made. It keeps one global voice and is
not thread-safe: use it from one thread of a process. It also carries the phase of its oscillators from one utterance
into the next. Samples repeat exactly only when a fresh process says the same texts in the same order. Called by
`registry` (speech) and by `phoneme_line` (phonemes for the neural voices).

Axis glossary: N samples.
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from jaxtml.data.packages import package_file, read_pinned
from jaxtml.data.voices.utterance import Rendering, plain, words_of

LIBRARY_SHA256 = "b15ce0803b26254e8a0d088c6b9281a2637b2b02613147cc320cfdefaf2c3ccf"
"""The library of espeakng-loader 0.2.4 (eSpeak NG 1.52) for Linux on x86-64."""

NORMAL_WPM = 165
"""Words per minute at rate 1. eSpeak's own default of 175 is faster than people talk in short answers."""

# Values of speak_lib.h.
_SYNCHRONOUS, _UTF8, _IPA, _USE_TIE = 2, 1, 0x02, 0x80
_RATE, _PITCH = 1, 3  # of espeak_PARAMETER
_END_OF_EVENTS, _WORD = 0, 1  # of espeak_EVENT_TYPE

_TIE = ord("͡")  # Between the letters of one phoneme (t͡ʃ, a͡ɪ): without it they would look like two phonemes.


class _Event(ctypes.Structure):
    """The struct `espeak_EVENT` of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_byte * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Engine:
    """The loaded library of this process, its callback, and what the callback has collected.

    Attributes:
      rate_hz: sample rate of eSpeak's output.
      chunks: int16 samples of the utterance being spoken.
      words: `(character, sample)` at which each word of that utterance starts.
    """

    def __init__(self) -> None:
        path = package_file("espeakng_loader", "libespeak-ng.so")
        read_pinned([path], LIBRARY_SHA256)
        self.lib = ctypes.CDLL(str(path))
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self.rate_hz = self.lib.espeak_Initialize(_SYNCHRONOUS, 200, str(path.parent / "espeak-ng-data").encode(), 0)
        self.chunks: list[np.ndarray] = []
        self.words: list[tuple[int, int]] = []
        self.callback = _Callback(self._collect)  # An attribute, because ctypes does not hold a reference.
        self.lib.espeak_SetSynthCallback(self.callback)
        self.lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.libc = ctypes.CDLL(None)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        """Called by eSpeak with each piece of sound. Returns 0: go on."""
        if count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _END_OF_EVENTS:
            if events[index].type == _WORD:
                self.words.append((events[index].text_position - 1, events[index].sample))
            index += 1
        return 0

    def set_voice(self, name: str) -> None:
        if self.lib.espeak_SetVoiceByName(name.encode()):
            raise ValueError(f"eSpeak has no voice {name!r}")


@cache
def _engine() -> _Engine:
    return _Engine()


def render(text: str, voice: str, rate: float, pitch: float) -> Rendering:
    """Speaks a text.

    Args:
      text: English, numbers as words.
      voice: accent and variant, as `en-us+f3`.
      rate: speed of speech; 1 is `NORMAL_WPM`.
      pitch: factor on the fundamental frequency; 1 is the variant's own.

    Raises:
      InputError: espeakng-loader is not installed, or is another version.
      ValueError: eSpeak has no such voice.
    """
    engine = _engine()
    engine.set_voice(voice)
    engine.chunks, engine.words = [], []
    engine.lib.espeak_ng_SetRandSeed(1)  # the default seed is the time of day
    engine.libc.srand(1)
    engine.lib.espeak_SetParameter(_RATE, round(NORMAL_WPM * rate), 0)
    # eSpeak's pitch runs from 0 to 99, and 50 is the variant's own. 50 steps are about an octave.
    engine.lib.espeak_SetParameter(_PITCH, int(np.clip(round(50 + 50 * np.log2(pitch)), 0, 99)), 0)
    line = plain(text)
    raw = line.encode() + b"\0"
    engine.lib.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, 1, 0, _UTF8, None, None)
    engine.lib.espeak_Synchronize()
    wave = np.concatenate([*engine.chunks, np.zeros(1, np.int16)]).astype(np.float32) / 32768
    return Rendering(wave, engine.rate_hz, _starts(line, engine.words, len(wave) / engine.rate_hz, engine.rate_hz))


def _starts(line: str, events: list[tuple[int, int]], length_s: float, rate_hz: int) -> tuple[float, ...]:
    """Returns the start of every word in seconds.

    eSpeak reports the start of a word as an event. It speaks some pairs of words ("of the") as one word with one event.
    The start of the second word is then interpolated between this event and the next one, by the number of letters.

    Args:
      line: the text that was spoken.
      events: `(character, sample)` of each event.
      length_s: length of the sound.
      rate_hz: sample rate of the events.
    """
    position, characters = 0, []
    for word in words_of(line):
        position = line.index(word, position)
        characters.append(position)
        position += len(word)
    times_s = {character: sample / rate_hz for character, sample in events}
    anchors = sorted((characters.index(c), c, time_s) for c, time_s in times_s.items() if c in characters)
    anchors.append((len(characters), len(line), length_s))
    starts = [0.0] * len(characters)
    for (word, character, time_s), (next_word, next_character, next_time_s) in pairwise(anchors):
        for index in range(word, next_word):
            letters = characters[index] - character
            starts[index] = time_s + (next_time_s - time_s) * letters / (next_character - character)
    return tuple(starts)


def phonemes(words: list[str], voice: str) -> list[str]:
    """Returns the IPA of each word, with ties as in `t͡ʃ`.

    The words are read together as one clause, so that "the" fits the vowel after it and "a" is unstressed.
    """
    engine = _engine()
    engine.set_voice(voice)
    groups = _clause_phonemes(engine, " ".join(words)).split()
    if len(groups) == len(words):
        return groups
    return _split_clause("".join(groups), [_clause_phonemes(engine, word).replace(" ", "") for word in words])


def _clause_phonemes(engine: _Engine, text: str) -> str:
    pointer = ctypes.c_char_p(text.encode())
    mode = _IPA | _USE_TIE | _TIE << 8
    clauses = []
    while pointer.value is not None:
        clauses.append(engine.lib.espeak_TextToPhonemes(ctypes.byref(pointer), _UTF8, mode).decode())
    return " ".join(clauses)


def _split_clause(clause: str, words: list[str]) -> list[str]:
    """Splits the phonemes of a clause into words, where eSpeak wrote two words as one ("ʌvðə").

    The clause is aligned, by edit distance, with the phonemes of each word spoken alone. It is cut where the borders of
    the words fall.

    Args:
      clause: phonemes of all words, without spaces.
      words: phonemes of each word spoken alone.
    """
    alone = "".join(words)
    cost = np.zeros((len(alone) + 1, len(clause) + 1))
    cost[0], cost[:, 0] = np.arange(len(clause) + 1), np.arange(len(alone) + 1)
    for i, a in enumerate(alone, 1):
        for j, b in enumerate(clause, 1):
            cost[i, j] = min(cost[i - 1, j - 1] + (a != b), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    position_in_clause = {len(alone): len(clause)}
    i, j = len(alone), len(clause)
    while i > 0:
        if j > 0 and cost[i, j] == cost[i, j - 1] + 1:
            j -= 1
        elif j > 0 and cost[i, j] == cost[i - 1, j - 1] + (alone[i - 1] != clause[j - 1]):
            i, j = i - 1, j - 1
        else:
            i -= 1
        position_in_clause[i] = j
    edges = [0, *(position_in_clause[n] for n in np.cumsum([len(word) for word in words]))]
    return [clause[low:high] for low, high in pairwise(edges)]
