"""Every voice, its split (training or test), and `synthesise`, which speaks with a synthetic one.

A voice is named `engine:name`: `espeak:en-us+f3`, `flite:slt`, `kokoro:af_bella`, `kokoro:af_bella+am_adam` (the mean
of two), `piper:joe`. Voices belong to one split, and only this file says which: no test voice, nor a mixture with one,
is ever heard in training. Called by `jaxtml.data.bank`, `jaxtml.data.bank_plan` and the tools that need one utterance.

How to add an engine: a module beside this one with `render(text, name, rate) -> Rendering`, a line in `synthesise`, and
its voices in the lists below. The tests of this file hold every engine to the same rules.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from jaxtml.data.voices import espeak, flite, kokoro, piper
from jaxtml.data.voices.utterance import Rendering, Utterance, finish
from jaxtml.errors import InputError

OWN_VOICE = "kokoro:af_heart"
"""The one voice of the model (Apache-2.0). No user has it."""

_ESPEAK_ACCENTS = ("en", "gmw/en-US-nyc", "en", "gmw/en-GB-scotland", "gmw/en-GB-x-gbclan")
"""Accents beside "en-us". Variant `i` of a list gets accent `i % 5`."""

# Variants that whisper, croak or sound like robots are left out, because no person speaks like them. Variants of which
# the speech recogniser (Whisper) misreads half of the words are left out too.
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
    """Returns each variant with the accent "en-us", and then each variant with one further accent."""
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
# Means of two training voices of one accent. They are further voices, as natural as the two.
KOKORO_MIXED = tuple(f"kokoro:{a}+{b}" for a, b in combinations(_KOKORO_TRAIN, 2) if a[0] == b[0])
PIPER_TRAIN = ("piper:joe",)


# Characters of `jaxtml.data.recordings.amazon_queen`. Some actors play several characters, so a test character may
# have the voice of a training character, in another role.
HUMAN_TEST = (
    "human:chef", "human:chief", "human:frank", "human:henry", "human:ian", "human:klunk", "human:lola", "human:lou",
    "human:naomi", "human:prin",
)  # fmt: skip
HUMAN_TRAIN = (
    "human:and", "human:ape", "human:bob", "human:bud", "human:death", "human:dog", "human:faye", "human:jim",
    "human:joe", "human:john", "human:laris", "human:man", "human:oracle", "human:sec", "human:showeram",
    "human:sparky", "human:tam", "human:wedge", "human:witch", "human:zombie",
)  # fmt: skip
"""People: recorded, not synthesised."""

TRAIN_VOICES = (*ESPEAK_TRAIN, *FLITE_TRAIN, *KOKORO_TRAIN, *KOKORO_MIXED, *PIPER_TRAIN)
TEST_VOICES = (*ESPEAK_TEST, *FLITE_TEST, *KOKORO_TEST)


def synthesise(voice: str, text: str, *, rate: float = 1.0, pitch: float = 1.0) -> Utterance:
    """Speaks a text once, as an `Utterance` (16 kHz, trimmed, with word times).

    The same call gives the same samples. With eSpeak that holds only for the same calls from the start of a process
    (see `espeak`).

    Args:
      voice: `engine:name`, any voice of the engine, even one that belongs to no split.
      text: English, numbers as words. Punctuation shapes the intonation and is no word.
      rate: speed of speech; 1 is the voice's own.
      pitch: factor on the fundamental frequency. eSpeak moves the fundamental alone. Recorded and neural voices scale
        the whole spectrum, as a shorter or longer vocal tract does, and keep the speed of speech.

    Raises:
      InputError: there is no such engine, the engine is not installed, or the text has digits or signs.
      ValueError: the engine has no such voice.
    """
    engine, _, name = voice.partition(":")
    if engine == "espeak":
        return finish(espeak.render(text, name, rate, pitch), voice, text)
    renderers = {"flite": flite.render, "kokoro": kokoro.render, "piper": piper.render}
    if engine not in renderers:
        raise InputError(f"no speech engine {engine!r}: use espeak, flite, kokoro or piper, as in {OWN_VOICE}")
    return finish(_scale_pitch(renderers[engine](text, name, rate / pitch), pitch), voice, text)


def _scale_pitch(rendering: Rendering, pitch: float) -> Rendering:
    """Returns the same samples, to be played `pitch` times as fast."""
    starts = tuple(start / pitch for start in rendering.starts_s)
    return replace(rendering, rate_hz=rendering.rate_hz * pitch, starts_s=starts)
