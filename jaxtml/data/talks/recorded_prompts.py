"""A person's voice for evaluation alone: the English prompts of Asterisk, joined into sentences of the first task.

The prompts (Debian's `asterisk-core-sounds-en-g722` and `-wav`, one American woman, CC-BY-SA-3.0) are isolated words
whose file name is their text. They are read where they are installed, are **never** used in training and are never
committed. Called by `jaxtml.evals.material`.

**How an item is made**, from one generator and nothing else:

- A sentence is drawn with `scenarios.sample_user_text` until all of its words are there as prompts, which leaves lists
  of phonetic names, days and months, three-digit codes, sums without "what is", "is A less than B", "today is D",
  "hello" and "goodbye". A number of two words alone ("forty two") is no sentence of the task: it tests its words.
- Each prompt is cut to its sound (10 ms blocks within 38 dB of the loudest, 5 ms of margin): the end of the last one is
  the acoustic end of the turn. Prompts keep their own level and their own falling pitch, as isolated words have it.
- Between prompts lie 50 to 250 ms of silence, 30 to 150 ms where the sentence could be over already and inside a
  number. A hesitation has one pause of 0.6 to 1.6 s where the sentence is open. In a barge-in a second turn starts 0.7
  to 1.0 s after the end of a first one that asks for a long reply: while a model that answers in time is speaking.
- The session begins with 0.4 to 1.2 s without speech and ends with 4.4 s; speech lies at -32 to -20 dBFS over steady
  noise 40 dB below it. Silent items hold that noise alone, or a beep, two tones or monkeys (from the same package).

Axis: N samples.
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

SOUNDS = ("beep", "ascending-2tone", "descending-2tone", "tt-monkeys")  # no speech in them
_SOUND_S = 3.0  # as much of one as is played

# Kinds in the order in which items take their turn. Of "exchange" and "hesitation": about what; "words": see above.
KINDS = (
    ("exchange", "repeat"), ("exchange", "number"), ("hesitation", "number"), ("exchange", "sum"),
    ("exchange", "words"), ("exchange", "repeat"), ("barge_in", "repeat"), ("silence", "noise"),
    ("exchange", "yes_no"), ("exchange", "greet"), ("hesitation", "repeat"), ("exchange", "number"),
    ("exchange", "sum"), ("hesitation", "sum"), ("exchange", "repeat"), ("exchange", "words"),
    ("barge_in", "number"), ("exchange", "other"), ("hesitation", "yes_no"), ("silence", "sound"),
)  # fmt: skip

_TENS = frozenset(number_words(value) for value in range(20, 100, 10))
_NUMBERS = _TENS | {number_words(value) for value in range(20)}
_LEAD_S, _REST_S = (0.4, 1.2), 4.4
_GAP_S, _SHORT_GAP_S, _PAUSE_S, _BARGE_S = (0.05, 0.25), (0.03, 0.15), (0.6, 1.6), (0.7, 1.0)
_LEVEL_DBFS, _NOISE_DB, _NOISE_TILT = (-32.0, -20.0), 40.0, -3.0


def _files() -> dict[str, str]:
    """Text of each prompt -> its file, without the ending."""
    files = {number_words(value): f"digits/{value}" for value in (*range(20), *range(20, 100, 10))}
    files |= {day: f"digits/day-{number}" for number, day in enumerate((DAYS[-1], *DAYS[:-1]))}  # Sunday is 0
    files |= {month: f"digits/mon-{number}" for number, month in enumerate(MONTHS)}
    files |= {name: f"phonetic/{name[0]}_p" for name in PHONETIC}
    files |= {"plus": "letters/plus", "minus": "digits/minus", "today": "digits/today", "less than": "queue-less-than"}
    return files | {word: word for word in ("is", "number", "hello", "goodbye")}


@dataclass(frozen=True)
class Prompts:
    """The prompts that belong to the task, cut to their sound.

    Attributes:
      clips: text -> the prompt; its words share its time equally ("less than" is the only prompt of two).
      sounds: sounds without speech, at unit level.
      source: which of the two packages was read.
    """

    clips: dict[str, Clip]
    sounds: tuple[np.ndarray, ...]
    source: str

    @staticmethod
    def read(folder: Path = FOLDER) -> Prompts:
        """Every prompt of the task that `folder` holds, from its 16 kHz G.722 files where PyAV can decode them, else
        from its 8 kHz WAVs.

        Raises:
          InputError: the packages are not installed.
        """
        wide = _can_decode_g722() and (folder / "digits" / "1.g722").is_file()
        ending, source = (".g722", "16 kHz G.722") if wide else (".wav", "8 kHz WAV")
        clips = {}
        for text, file in _files().items():
            path = folder / f"{file}{ending}"
            if path.is_file():
                clips[text] = _prompt(_decoded(path), text)
        if not {number_words(value) for value in range(10)} <= clips.keys():
            raise InputError(f"the recorded prompts are not in {folder}: {INSTALL}")
        sounds = [folder / f"{name}{ending}" for name in SOUNDS]
        return Prompts(clips, tuple(_sound(_decoded(path)) for path in sounds if path.is_file()), source)

    def cover(self, text: str) -> tuple[str, ...] | None:
        """The prompts that say `text`, in order; None: one is missing."""
        words, found = text.split(), []
        while words:
            here = next((n for n in (2, 1) if len(words) >= n and " ".join(words[:n]) in self.clips), None)
            if here is None:
                return None
            found.append(" ".join(words[:here]))
            words = words[here:]
        return tuple(found)


def _can_decode_g722() -> bool:
    try:
        import av
    except ImportError:
        return False
    return "g722" in av.formats_available


def _decoded(path: Path) -> np.ndarray:
    """`[N]` float32 at 16 kHz."""
    if path.suffix != ".g722":
        return read_audio(path)
    import av

    with av.open(str(path), format="g722") as file:
        frames = [np.asarray(frame.to_ndarray()).reshape(-1) for frame in file.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


def _prompt(wave: np.ndarray, text: str) -> Clip:
    clip = edits.trimmed(Clip(wave, ()), margin=80)
    words = text.split()
    each = len(clip.wave) / SAMPLE_RATE / len(words)
    return Clip(clip.wave, tuple(Word(word, k * each, (k + 1) * each) for k, word in enumerate(words)))


def _sound(wave: np.ndarray) -> np.ndarray:
    cut = edits.trimmed(Clip(wave, ())).wave[: int(_SOUND_S * SAMPLE_RATE)]
    return edits.levelled(Clip(edits.faded(cut), ()), 1.0).wave


# --- items


def make_prompted_conversation(rng: np.random.Generator, prompts: Prompts, kind: tuple[str, str]) -> Conversation:
    """A session of `kind` (one of `KINDS`) as the module's docstring says.

    Returns:
      A conversation whose assistant is silent. `scenario` names the turns, `expected` the right replies joined by " | "
      (empty for a turn that is no sentence of the task).
    """
    scene, about = kind
    if scene == "silence":
        return _silent(rng, prompts, about)
    lead = _seconds(rng, _LEAD_S)
    if scene == "barge_in":
        first = _spoken(rng, prompts, _sentence(rng, prompts, about, at_least=3))
        second = _spoken(rng, prompts, _sentence(rng, prompts, _pick(rng, ("repeat", "number", "sum"))))
        turns = [(lead, first), (lead + len(first.wave) + _seconds(rng, _BARGE_S), second)]
    else:
        turns = [(lead, _spoken(rng, prompts, _sentence(rng, prompts, about), hesitant=scene == "hesitation"))]
    texts = [clip.text for _, clip in turns]
    return Conversation(
        *_session(rng, turns),
        user_words=tuple(word for at, clip in turns for word in _moved(clip, at)),
        scenario="exchange barge_in" if scene == "barge_in" else scene,
        expected=" | ".join(reply_to(text.split()) if is_complete(text.split()) else "" for text in texts),
        user_end_s=tuple((at + len(clip.wave)) / SAMPLE_RATE for at, clip in turns),
    )


def _sentence(rng: np.random.Generator, prompts: Prompts, about: str, at_least: int = 1) -> str:
    """A sentence of `about` that the prompts can say, of so many words."""
    if about == "words":
        tens, ones = int(rng.integers(2, 10)), int(rng.integers(1, 10))
        return number_words(10 * tens + ones)
    for _ in range(10_000):
        intent, text = sample_user_text(rng)
        if intent == about and len(text.split()) >= at_least and prompts.cover(text) is not None:
            return text
    raise InputError(f"the recorded prompts can say no sentence of {about!r}: {INSTALL}")


def _spoken(rng: np.random.Generator, prompts: Prompts, text: str, hesitant: bool = False) -> Clip:
    """The sentence with its gaps; with one pause where `hesitant`."""
    parts = prompts.cover(text)
    assert parts is not None, text
    words, gaps, said, open_gaps = text.split(), [], 0, []
    for number, part in enumerate(parts[:-1]):
        said += len(part.split())
        inside_number = set(words[said - 1 : said + 1]) <= _NUMBERS and words[said - 1] in _TENS
        waits = incomplete_after(words, said) and not inside_number
        gaps.append(_seconds(rng, _GAP_S if waits else _SHORT_GAP_S))
        if waits:
            open_gaps.append(number)
    if hesitant:
        gaps[open_gaps[int(rng.integers(len(open_gaps)))]] = _seconds(rng, _PAUSE_S)
    return edits.joined([prompts.clips[part] for part in parts], gaps)


def _session(rng: np.random.Generator, turns: Sequence[tuple[int, Clip]]) -> tuple[np.ndarray, np.ndarray]:
    """The user's channel with `turns` `(first sample, clip)` and an assistant who is silent, `[N]` float32 each."""
    end = max(at + len(clip.wave) for at, clip in turns) + int(_REST_S * SAMPLE_RATE)
    voice = np.zeros(-(-end // MICRO_TURN_SAMPLES) * MICRO_TURN_SAMPLES, np.float32)
    for at, clip in turns:
        voice[at : at + len(clip.wave)] += edits.levelled(clip, 1.0).wave
    line = Channel(level_dbfs=float(rng.uniform(*_LEVEL_DBFS)), noise_db=_NOISE_DB, noise_tilt=_NOISE_TILT)
    return apply_channel(rng, line, voice), np.zeros(len(voice), np.float32)


def _silent(rng: np.random.Generator, prompts: Prompts, about: str) -> Conversation:
    """A session in which nobody speaks."""
    wave = np.zeros(SAMPLE_RATE, np.float32)
    if about == "sound" and prompts.sounds:
        wave = prompts.sounds[int(rng.integers(len(prompts.sounds)))]
    return Conversation(*_session(rng, [(_seconds(rng, _LEAD_S), Clip(wave, ()))]), scenario="silence")


def _moved(clip: Clip, samples: int) -> list[Word]:
    shift_s = samples / SAMPLE_RATE
    return [Word(word.text, word.start_s + shift_s, word.end_s + shift_s) for word in clip.words]


def _seconds(rng: np.random.Generator, bounds: tuple[float, float]) -> int:
    """Samples of a duration drawn from `bounds`."""
    return int(rng.uniform(*bounds) * SAMPLE_RATE)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]
