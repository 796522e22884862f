"""Sessions with a person's voice, for evaluation alone: Asterisk's English prompts, joined into sentences.

The prompts (Debian's `asterisk-core-sounds-en-g722` and `-wav`, one American woman, CC-BY-SA-3.0) are isolated words
whose file name is their text. They are read where they are installed. They are **never** used in training and never
committed. Called by `jaxtml.evals.material`. "The task" is the short-answer task of `jaxtml.data.tasks.scenarios`.

How a session is made, from one random generator and nothing else:

- **Sentence.** `scenarios.sample_user_text` draws sentences until the prompts have all words of one. The prompts can
  say only these sentences: lists of phonetic names, days and months, three-digit codes, sums without "what is", "is A
  less than B", "today is D", "hello" and "goodbye". A session of the kind "words" has only a number of two words
  ("forty two"). That is no sentence of the task; it tests whether the model hears the words.
- **Prompts.** Each prompt is cut to its sound: 10 ms blocks within 38 dB of the loudest one, with 5 ms of margin. So
  the end of the last prompt is the acoustic end of the user turn. Prompts keep their own level and their own falling
  pitch, as isolated words have it.
- **Gaps.** A sentence is open at a gap if the words before the gap are no complete sentence. The silence in an open gap
  lasts 50 to 250 ms. In other gaps, and inside a number, it lasts 30 to 150 ms. A hesitation has one pause of 0.6 to
  1.6 s, in an open gap.
- **Barge-in.** The first user turn asks for a long reply. A second user turn starts 0.7 to 1.0 s after the end of the
  first one. A model that answers without delay is speaking at that time.
- **Session.** It begins with 0.4 to 1.2 s and ends with 4.4 s without speech. Speech lies at -32 to -20 dBFS over
  steady noise that is 40 dB below it. Silent sessions have that noise alone, or a recording without speech from the
  same package: a beep, two tones, monkeys.

Axis glossary: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtml.data.talks import edits
from jaxtml.data.talks.channel import Channel, apply_channel
from jaxtml.data.talks.edits import Clip
from jaxtml.data.tasks.scenarios import (
    DAYS,
    MONTHS,
    PHONETIC,
    incomplete_after,
    is_complete,
    number_words,
    reply_to,
    sample_user_text,
)
from jaxtml.errors import InputError
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.conversation import Conversation, Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
VOICE = "human:asterisk-en"
INSTALL = "apt-get install asterisk-core-sounds-en-g722 asterisk-core-sounds-en-wav"

SOUNDS = ("beep", "ascending-2tone", "descending-2tone", "tt-monkeys")
"""Recordings without speech."""

_SOUND_S = 3.0  # how much of such a recording is played, at most

KINDS = (
    ("exchange", "repeat"), ("exchange", "number"), ("hesitation", "number"), ("exchange", "sum"),
    ("exchange", "words"), ("exchange", "repeat"), ("barge_in", "repeat"), ("silence", "noise"),
    ("exchange", "yes_no"), ("exchange", "greet"), ("hesitation", "repeat"), ("exchange", "number"),
    ("exchange", "sum"), ("hesitation", "sum"), ("exchange", "repeat"), ("exchange", "words"),
    ("barge_in", "number"), ("exchange", "other"), ("hesitation", "yes_no"), ("silence", "sound"),
)  # fmt: skip
"""The kinds of session, `(scenario, about)`, in the order in which evaluations go through them.

`about` is an intent of the task, or "words" for a number alone. Of a silent session, it is "noise" or "sound"."""

_TENS = frozenset(number_words(value) for value in range(20, 100, 10))
_NUMBERS = _TENS | {number_words(value) for value in range(20)}
_LEAD_S, _REST_S = (0.4, 1.2), 4.4
_GAP_S, _SHORT_GAP_S, _PAUSE_S, _BARGE_IN_AFTER_S = (0.05, 0.25), (0.03, 0.15), (0.6, 1.6), (0.7, 1.0)
_LEVEL_DBFS, _NOISE_DB, _NOISE_TILT = (-32.0, -20.0), 40.0, -3.0


def _files() -> dict[str, str]:
    """Returns a map from the text of each prompt to its file, without the file name's suffix."""
    files = {number_words(value): f"digits/{value}" for value in (*range(20), *range(20, 100, 10))}
    files |= {day: f"digits/day-{number}" for number, day in enumerate((DAYS[-1], *DAYS[:-1]))}  # Sunday is 0
    files |= {month: f"digits/mon-{number}" for number, month in enumerate(MONTHS)}
    files |= {name: f"phonetic/{name[0]}_p" for name in PHONETIC}
    files |= {"plus": "letters/plus", "minus": "digits/minus", "today": "digits/today", "less than": "queue-less-than"}
    return files | {word: word for word in ("is", "number", "hello", "goodbye")}


@dataclass(frozen=True)
class Prompts:
    """The prompts of the task's words, cut to their sound.

    Attributes:
      clips: text -> the prompt. "less than" is the only prompt of two words; each word gets half of the prompt's time.
      sounds: `[N]` each, recordings without speech at unit level.
      source: which of the two packages was read.
    """

    clips: dict[str, Clip]
    sounds: tuple[np.ndarray, ...]
    source: str

    @staticmethod
    def read(folder: Path = FOLDER) -> Prompts:
        """Reads every prompt of the task that `folder` holds.

        The 16 kHz G.722 files are read where PyAV can decode them, else the 8 kHz WAV files.

        Raises:
          InputError: the packages are not installed.
        """
        is_wide = _can_decode_g722() and (folder / "digits" / "1.g722").is_file()
        ending, source = (".g722", "16 kHz G.722") if is_wide else (".wav", "8 kHz WAV")
        clips = {}
        for text, file in _files().items():
            path = folder / f"{file}{ending}"
            if path.is_file():
                clips[text] = _prompt(_read(path), text)
        if not {number_words(value) for value in range(10)} <= clips.keys():
            raise InputError(f"the recorded prompts are not in {folder}: {INSTALL}")
        sounds = [folder / f"{name}{ending}" for name in SOUNDS]
        return Prompts(clips, tuple(_sound(_read(path)) for path in sounds if path.is_file()), source)

    def cover(self, text: str) -> tuple[str, ...] | None:
        """Returns the prompts that say `text`, in order, or None if one is missing."""
        words, found = text.split(), []
        while words:
            length = next((n for n in (2, 1) if len(words) >= n and " ".join(words[:n]) in self.clips), None)
            if length is None:
                return None
            found.append(" ".join(words[:length]))
            words = words[length:]
        return tuple(found)


def _can_decode_g722() -> bool:
    try:
        import av
    except ImportError:
        return False
    return "g722" in av.formats_available


def _read(path: Path) -> np.ndarray:
    """Returns `[N]` float32 at 16 kHz."""
    if path.suffix != ".g722":
        return read_audio(path)
    import av

    with av.open(str(path), format="g722") as file:
        frames = [np.asarray(frame.to_ndarray()).reshape(-1) for frame in file.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


def _prompt(wave: np.ndarray, text: str) -> Clip:
    clip = edits.trim(Clip(wave, ()), margin=80)
    words = text.split()
    word_s = len(clip.wave) / SAMPLE_RATE / len(words)
    return Clip(clip.wave, tuple(Word(word, k * word_s, (k + 1) * word_s) for k, word in enumerate(words)))


def _sound(wave: np.ndarray) -> np.ndarray:
    cut = edits.trim(Clip(wave, ())).wave[: int(_SOUND_S * SAMPLE_RATE)]
    return edits.set_level(Clip(edits.fade_ends(cut), ()), 1.0).wave


# --- sessions


def make_prompted_conversation(rng: np.random.Generator, prompts: Prompts, kind: tuple[str, str]) -> Conversation:
    """Draws a session of `kind`, one of `KINDS`, as the module's docstring says.

    Returns:
      A conversation whose assistant is silent. `scenario` has the name of the scenario of each user turn. `expected`
      has the right reply to each user turn, with " | " between replies. The reply is empty for a user turn that is no
      sentence of the task.

    Raises:
      InputError: the prompts can say no sentence of this kind.
    """
    scenario, about = kind
    if scenario == "silence":
        return _silent_conversation(rng, prompts, about)
    lead = _draw_samples(rng, _LEAD_S)
    if scenario == "barge_in":
        first = _say(rng, prompts, _draw_sentence(rng, prompts, about, min_words=3))
        second = _say(rng, prompts, _draw_sentence(rng, prompts, _pick(rng, ("repeat", "number", "sum"))))
        user_turns = [(lead, first), (lead + len(first.wave) + _draw_samples(rng, _BARGE_IN_AFTER_S), second)]
    else:
        clip = _say(rng, prompts, _draw_sentence(rng, prompts, about), hesitates=scenario == "hesitation")
        user_turns = [(lead, clip)]
    texts = [clip.text for _, clip in user_turns]
    return Conversation(
        *_waves(rng, user_turns),
        user_words=tuple(word for start, clip in user_turns for word in _shift_words(clip, start)),
        scenario="exchange barge_in" if scenario == "barge_in" else scenario,
        expected=" | ".join(reply_to(text.split()) if is_complete(text.split()) else "" for text in texts),
        user_end_s=tuple((start + len(clip.wave)) / SAMPLE_RATE for start, clip in user_turns),
    )


def _draw_sentence(rng: np.random.Generator, prompts: Prompts, about: str, min_words: int = 1) -> str:
    """Draws a sentence about `about` that the prompts can say and that has at least `min_words` words."""
    if about == "words":
        tens, ones = int(rng.integers(2, 10)), int(rng.integers(1, 10))
        return number_words(10 * tens + ones)
    for _ in range(10_000):
        intent, text = sample_user_text(rng)
        if intent == about and len(text.split()) >= min_words and prompts.cover(text) is not None:
            return text
    raise InputError(f"the recorded prompts can say no sentence of {about!r}: {INSTALL}")


def _say(rng: np.random.Generator, prompts: Prompts, text: str, hesitates: bool = False) -> Clip:
    """Joins the prompts of a sentence with gaps between them, one of which is a pause if the user `hesitates`."""
    prompt_texts = prompts.cover(text)
    assert prompt_texts is not None, text
    words, gaps, said, open_gaps = text.split(), [], 0, []
    for number, prompt_text in enumerate(prompt_texts[:-1]):
        said += len(prompt_text.split())
        inside_number = set(words[said - 1 : said + 1]) <= _NUMBERS and words[said - 1] in _TENS
        is_open = incomplete_after(words, said) and not inside_number
        gaps.append(_draw_samples(rng, _GAP_S if is_open else _SHORT_GAP_S))
        if is_open:
            open_gaps.append(number)
    if hesitates:
        gaps[open_gaps[int(rng.integers(len(open_gaps)))]] = _draw_samples(rng, _PAUSE_S)
    return edits.join([prompts.clips[prompt_text] for prompt_text in prompt_texts], gaps)


def _waves(rng: np.random.Generator, user_turns: Sequence[tuple[int, Clip]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the microphone hears and a silent assistant, `[N]` float32 each.

    Args:
      rng: draws the level and the noise.
      user_turns: `(first sample, clip)` of each user turn.
    """
    end = max(start + len(clip.wave) for start, clip in user_turns) + int(_REST_S * SAMPLE_RATE)
    voice = np.zeros(-(-end // MICRO_TURN_SAMPLES) * MICRO_TURN_SAMPLES, np.float32)
    for start, clip in user_turns:
        voice[start : start + len(clip.wave)] += edits.set_level(clip, 1.0).wave
    channel = Channel(level_dbfs=float(rng.uniform(*_LEVEL_DBFS)), noise_db=_NOISE_DB, noise_tilt=_NOISE_TILT)
    return apply_channel(rng, channel, voice), np.zeros(len(voice), np.float32)


def _silent_conversation(rng: np.random.Generator, prompts: Prompts, about: str) -> Conversation:
    """Draws a session in which nobody speaks."""
    wave = np.zeros(SAMPLE_RATE, np.float32)
    if about == "sound" and prompts.sounds:
        wave = prompts.sounds[int(rng.integers(len(prompts.sounds)))]
    return Conversation(*_waves(rng, [(_draw_samples(rng, _LEAD_S), Clip(wave, ()))]), scenario="silence")


def _shift_words(clip: Clip, samples: int) -> list[Word]:
    shift_s = samples / SAMPLE_RATE
    return [Word(word.text, word.start_s + shift_s, word.end_s + shift_s) for word in clip.words]


def _draw_samples(rng: np.random.Generator, bounds_s: tuple[float, float]) -> int:
    """Draws a duration between two bounds in seconds, and returns it in samples."""
    return int(rng.uniform(*bounds_s) * SAMPLE_RATE)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]
