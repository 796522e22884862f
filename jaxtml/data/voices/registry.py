"""Every voice we can speak with, who may be heard in training and who is kept for the test, and `synthesise`.

A voice is named `engine:name`: `espeak:en-us+f3`, `flite:slt`, `kokoro:af_bella`, `kokoro:af_bella+am_adam` (the mean
of two), `piper:joe`. The split is by voice and stands here alone: no test voice, nor a mixture with one, is ever heard
in training. Called by `bank` and by whoever needs a single utterance.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from jaxtml.data.voices import espeak, flite, kokoro, piper
from jaxtml.data.voices.utterance import Rendering, Utterance, finish
from jaxtml.errors import InputError

OWN_VOICE = "kokoro:af_heart"  # the model's one voice (Apache-2.0); never a user's

_ESPEAK_ACCENTS = ("en", "gmw/en-US-nyc", "en", "gmw/en-GB-scotland", "gmw/en-GB-x-gbclan")  # each beside "en-us"
# Left out: whispers, croaks and robots, which no person sounds like, and whatever Whisper misreads every other word of.
_ESPEAK_TRAIN = (
    "Alex", "Andy", "Annie", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Marco", "Mario", "Michael",
    "Mike", "Nguyen", "Reed", "Storm", "adam", "anika", "announcer", "antonio", "aunty", "benjamin", "caleb", "ed",
    "edward", "edward2", "f1", "f2", "f3", "f5", "grandma", "grandpa", "gustave", "iven2", "iven3", "iven4", "klatt",
    "klatt2", "klatt3", "klatt4", "klatt5", "klatt6", "m1", "m2", "m3", "m4", "m6", "m7", "m8", "marcelo", "max",
    "michel", "miguel", "mike2", "pablo", "paul", "pedro", "rob", "robert", "sandro", "shelby", "steph", "steph2",
    "steph3", "travis",
)  # fmt: skip
_ESPEAK_TEST = (
    "Alicia", "Andrea", "Denis", "belinda", "david", "f4", "john", "m5", "norbert", "quincy", "victor", "zac",
)  # fmt: skip

_KOKORO_TRAIN = (
    "af_alloy", "af_aoede", "af_bella", "af_jessica", "af_kore", "af_nicole", "af_river", "af_sarah", "af_sky",
    "am_adam", "am_echo", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_puck", "am_santa", "bf_emma",
    "bf_isabella", "bf_lily", "bm_fable", "bm_george", "bm_lewis",
)  # fmt: skip
_KOKORO_TEST = (
    "af_nova", "am_eric", "bf_alice", "bm_daniel",
)  # fmt: skip


def _accented(variants: tuple[str, ...]) -> tuple[str, ...]:
    """Each variant as an American, and then each with one further accent."""
    others = tuple(_ESPEAK_ACCENTS[i % len(_ESPEAK_ACCENTS)] for i in range(len(variants)))
    return tuple(
        f"espeak:{accent}+{variant}"
        for accents in (("en-us",) * len(variants), others)
        for accent, variant in zip(accents, variants, strict=True)
    )


ESPEAK_TRAIN = _accented(_ESPEAK_TRAIN)
ESPEAK_TEST = _accented(_ESPEAK_TEST)
FLITE_TRAIN = ("flite:slt", "flite:awb", "flite:kal16")
FLITE_TEST = ("flite:rms",)
KOKORO_TRAIN = tuple(f"kokoro:{name}" for name in _KOKORO_TRAIN)
KOKORO_TEST = tuple(f"kokoro:{name}" for name in _KOKORO_TEST)
# Means of two training voices of one accent: further speakers, as natural as their parents.
KOKORO_MIXED = tuple(f"kokoro:{a}+{b}" for a, b in combinations(_KOKORO_TRAIN, 2) if a[0] == b[0])
PIPER_TRAIN = ("piper:joe",)

TRAIN_VOICES = (*ESPEAK_TRAIN, *FLITE_TRAIN, *KOKORO_TRAIN, *KOKORO_MIXED, *PIPER_TRAIN)
TEST_VOICES = (*ESPEAK_TEST, *FLITE_TEST, *KOKORO_TEST)


def synthesise(voice: str, text: str, *, rate: float = 1.0, pitch: float = 1.0) -> Utterance:
    """Speak `text` once, as an `Utterance` (16 kHz, trimmed, word-timed).

    The same call gives the same samples, except with eSpeak, where that holds from process start (see `espeak`).

    Args:
      voice: `engine:name`, any voice of the engine (also outside the splits).
      text: English, numbers as words; punctuation shapes the intonation and is no word.
      rate: speed of speech; 1 is the voice's own.
      pitch: factor on the fundamental. eSpeak moves the fundamental alone; for the recorded and neural voices the whole
        spectrum is scaled (as a shorter or longer vocal tract), with the speed of speech kept.
    """
    engine, _, name = voice.partition(":")
    if engine == "espeak":
        return finish(espeak.render(text, name, rate, pitch), voice, text)
    renderers = {"flite": flite.render, "kokoro": kokoro.render, "piper": piper.render}
    if engine not in renderers:
        raise InputError(f"no speech engine {engine!r}: use espeak, flite, kokoro or piper, as in {OWN_VOICE}")
    return finish(_shifted(renderers[engine](text, name, rate / pitch), pitch), voice, text)


def _shifted(rendering: Rendering, pitch: float) -> Rendering:
    """The same samples played `pitch` times as fast."""
    starts = tuple(start / pitch for start in rendering.starts_s)
    return replace(rendering, rate_hz=rendering.rate_hz * pitch, starts_s=starts)
