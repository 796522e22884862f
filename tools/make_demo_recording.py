#!/usr/bin/env python3
"""Makes jaxtml/assets/demo/human.flac: ten seconds of a human speaker for `tools/demo`.

    apt-get install asterisk-core-sounds-en-g722
    python tools/make_demo_recording.py

Words of Allison Smith (Asterisk core sounds, CC-BY-SA-3.0; see jaxtml/assets/demo/NOTICE), which training never hears,
put together into three turns with silence in which the model can answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import soundfile

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
OUT = Path(__file__).resolve().parent.parent / "jaxtml" / "assets" / "demo" / "human.flac"
TURNS = (
    ("digits/3", "letters/plus", "digits/4"),
    ("digits/mon-2", "digits/mon-6"),
    ("digits/9", "digits/1", "digits/6"),
)
RATE, GAP_S, SILENCE_S, LEAD_S = 16_000, 0.12, 2.6, 0.6


def word(name: str) -> np.ndarray:
    """One prompt, 16 kHz float32, cut to where it can be heard."""
    with av.open(str(SOUNDS / f"{name}.g722"), format="g722") as file:
        wave = np.concatenate([frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]) / np.float32(32768)
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return wave[loud[0] : loud[-1] + 1]


def main() -> int:
    if not SOUNDS.is_dir():
        print(f"{SOUNDS} is missing: apt-get install asterisk-core-sounds-en-g722", file=sys.stderr)
        return 2
    rng = np.random.default_rng(0)

    def silence(seconds: float) -> np.ndarray:
        return (1e-4 * rng.standard_normal(round(seconds * RATE))).astype(np.float32)

    parts = [silence(LEAD_S)]
    for turn in TURNS:
        for i, name in enumerate(turn):
            parts += [silence(GAP_S)] * (i > 0) + [word(name)]
        parts.append(silence(SILENCE_S))
    wave = np.concatenate(parts)
    soundfile.write(OUT, wave, RATE, format="FLAC", subtype="PCM_16")
    print(f"{OUT}: {len(wave) / RATE:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
