"""eSpeak NG through ctypes: about a hundred voice variants in several English accents, word times, and phonemes.

The library (package espeakng-loader, GPL-3, used as a tool at data-making time) keeps one global voice and is not
thread-safe: use it from one thread of a process. It also carries the phase of its oscillators from one utterance into
the next: samples repeat exactly only when a fresh process says the same things in the same order. Called by `voices`
(speech) and by `kokoro` and `piper` (phonemes).
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from jaxtml.data.packages import package_file, read_pinned
from jaxtml.data.voices.utterance import Rendering, plain, words_of

# espeakng-loader 0.2.4 (eSpeak NG 1.52), linux x86-64.
LIBRARY_SHA256 = "b15ce0803b26254e8a0d088c6b9281a2637b2b02613147cc320cfdefaf2c3ccf"
NORMAL_WPM = 165  # words per minute at rate 1; eSpeak's own default of 175 is faster than people answer

_SYNCHRONOUS, _UTF8, _IPA = 2, 1, 0x02
_TIE = ord("͡")  # written between the letters of one phoneme (t͡ʃ, a͡ɪ), so that they can be told from two
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_END_OF_EVENTS, _WORD = 0, 1


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

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
    """The one loaded library of this process, its callback and what the callback has gathered."""

    def __init__(self) -> None:
        path = package_file("espeakng_loader", "libespeak-ng.so")
        read_pinned([path], LIBRARY_SHA256)
        self.lib = ctypes.CDLL(str(path))
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self.rate_hz = self.lib.espeak_Initialize(_SYNCHRONOUS, 200, str(path.parent / "espeak-ng-data").encode(), 0)
        self.chunks: list[np.ndarray] = []
        self.words: list[tuple[int, int]] = []  # (character, sample)
        self.callback = _Callback(self._gather)  # kept: ctypes does not hold a reference
        self.lib.espeak_SetSynthCallback(self.callback)
        self.lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.libc = ctypes.CDLL(None)

    def _gather(self, samples, count: int, events) -> int:
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
    """Speak `text` with `voice` (as `en-us+f3`). `rate` 1 is `NORMAL_WPM`; `pitch` 1 is the variant's own."""
    engine = _engine()
    engine.set_voice(voice)
    engine.chunks, engine.words = [], []
    engine.lib.espeak_ng_SetRandSeed(1)  # it starts from the clock
    engine.libc.srand(1)
    engine.lib.espeak_SetParameter(_RATE, round(NORMAL_WPM * rate), 0)
    # eSpeak's pitch runs 0..99 with 50 the variant's own; 50 steps are about an octave.
    engine.lib.espeak_SetParameter(_PITCH, int(np.clip(round(50 + 50 * np.log2(pitch)), 0, 99)), 0)
    line = plain(text)
    raw = line.encode() + b"\0"
    engine.lib.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, 1, 0, _UTF8, None, None)
    engine.lib.espeak_Synchronize()
    wave = np.concatenate([*engine.chunks, np.zeros(1, np.int16)]).astype(np.float32) / 32768
    return Rendering(wave, engine.rate_hz, _starts(line, engine.words, len(wave) / engine.rate_hz, engine.rate_hz))


def _starts(line: str, events: list[tuple[int, int]], length_s: float, rate_hz: int) -> tuple[float, ...]:
    """Start of every word of `line` in seconds. eSpeak speaks some pairs ("of the") as one word with one event: the
    second of a pair starts part of the way to the next event, by its share of the letters."""
    position, where = 0, []
    for word in words_of(line):
        position = line.index(word, position)
        where.append(position)
        position += len(word)
    known = {character: sample / rate_hz for character, sample in events}
    anchors = sorted((where.index(c), c, t) for c, t in known.items() if c in where)
    anchors.append((len(where), len(line), length_s))
    starts = [0.0] * len(where)
    for (index, at, time), (next_index, next_at, next_time) in zip(anchors, anchors[1:], strict=False):
        for word in range(index, next_index):
            starts[word] = time + (next_time - time) * (where[word] - at) / (next_at - at)
    return tuple(starts)


def phonemes(words: list[str], voice: str) -> list[str]:
    """IPA of each word, spoken together as one clause ("the" before a vowel, unstressed "a"), ties as `t͡ʃ`."""
    engine = _engine()
    engine.set_voice(voice)
    groups = _clause(engine, " ".join(words)).split()
    if len(groups) == len(words):
        return groups
    return _share(groups, [_clause(engine, word).replace(" ", "") for word in words])


def _clause(engine: _Engine, text: str) -> str:
    pointer = ctypes.c_char_p(text.encode())
    heard = []
    while pointer.value is not None:
        heard.append(engine.lib.espeak_TextToPhonemes(ctypes.byref(pointer), _UTF8, _IPA | 0x80 | _TIE << 8).decode())
    return " ".join(heard)


def _share(groups: list[str], alone: list[str]) -> list[str]:
    """Cut the phonemes of a clause into its words where eSpeak wrote two as one ("ʌvðə"): align them, by edit distance,
    with the words spoken alone, and cut where the words' borders fall."""
    joined, spoken = "".join(groups), "".join(alone)
    cost = np.zeros((len(spoken) + 1, len(joined) + 1))
    cost[0], cost[:, 0] = np.arange(len(joined) + 1), np.arange(len(spoken) + 1)
    for i, a in enumerate(spoken, 1):
        for j, b in enumerate(joined, 1):
            cost[i, j] = min(cost[i - 1, j - 1] + (a != b), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    at = {len(spoken): len(joined)}
    i, j = len(spoken), len(joined)
    while i > 0:
        if j > 0 and cost[i, j] == cost[i, j - 1] + 1:
            j -= 1
        elif j > 0 and cost[i, j] == cost[i - 1, j - 1] + (spoken[i - 1] != joined[j - 1]):
            i, j = i - 1, j - 1
        else:
            i -= 1
        at[i] = j
    edges = [0, *(at[n] for n in np.cumsum([len(word) for word in alone]))]
    return [joined[low:high] for low, high in zip(edges, edges[1:], strict=False)]
