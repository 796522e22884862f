"""Flite through ctypes: four American and Scottish voices made from recordings of people, with word times.

The shared libraries are those of Debian's flite package (BSD-like licence). Word times come from the segments that
Flite keeps of each utterance. Called by `registry`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from jaxtml.data.packages import INSTALL
from jaxtml.data.voices.utterance import Rendering, plain
from jaxtml.errors import InputError

NAMES = ("kal16", "slt", "rms", "awb")
"""The voices."""


class _Wave(ctypes.Structure):
    """The struct `cst_wave` of cst_wave.h."""

    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class _Voice(ctypes.Structure):
    """The first fields of the struct `cst_voice` of cst_voice.h."""

    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _library() -> ctypes.CDLL:
    try:
        for name in ("flite", "flite_usenglish", "flite_cmulex"):
            ctypes.CDLL(f"lib{name}.so.1", mode=ctypes.RTLD_GLOBAL)
        lib = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise InputError(f"the speech package flite is not installed: {INSTALL}") from error
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("flite_init", ctypes.c_int, []),
        ("flite_synth_text", pointer, [text, pointer]),
        ("utt_wave", ctypes.POINTER(_Wave), [pointer]),
        ("utt_relation", pointer, [pointer, text]),
        ("relation_head", pointer, [pointer]),
        ("item_next", pointer, [pointer]),
        ("ffeature_float", ctypes.c_float, [pointer, text]),
        ("feat_set_float", None, [pointer, text, ctypes.c_float]),
        ("delete_utterance", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.flite_init()
    return lib


@cache
def _voice(name: str) -> Any:
    """Returns a pointer to the registered voice."""
    if name not in NAMES:
        raise ValueError(f"Flite has no voice {name!r}")
    _library()
    register = getattr(ctypes.CDLL(f"libflite_cmu_us_{name}.so.1", mode=ctypes.RTLD_GLOBAL), f"register_cmu_us_{name}")
    register.restype, register.argtypes = ctypes.POINTER(_Voice), [ctypes.c_void_p]
    return register(None)


def render(text: str, voice: str, rate: float) -> Rendering:
    """Speaks a text.

    Args:
      text: English, numbers as words.
      voice: one of `NAMES`.
      rate: speed of speech; 1 is the voice's own.

    Raises:
      InputError: Flite is not installed.
      ValueError: Flite has no such voice.
    """
    lib, speaker = _library(), _voice(voice)
    _libc().srand(1)  # Flite draws its excitation with C's rand.
    lib.feat_set_float(speaker.contents.features, b"duration_stretch", 1.0 / rate)
    utterance = lib.flite_synth_text(plain(text).encode(), ctypes.cast(speaker, ctypes.c_void_p))
    spoken = lib.utt_wave(utterance).contents
    wave = np.ctypeslib.as_array(spoken.samples, (spoken.num_samples,)).astype(np.float32) / 32768
    starts = []
    token = lib.relation_head(lib.utt_relation(utterance, b"Token"))
    while token:
        # A word's first segment starts where the segment before it ends.
        starts.append(lib.ffeature_float(token, b"daughter1.R:SylStructure.daughter1.daughter1.R:Segment.p.end"))
        token = lib.item_next(token)
    rate_hz = spoken.sample_rate
    lib.delete_utterance(utterance)
    return Rendering(wave, rate_hz, tuple(starts))
