#!/usr/bin/env python3
"""How well the vocoder speaks: PESQ, STOI and an independent ASR's word errors, against Griffin-Lim on the same frames.

    python tools/benchmarks/vocoder.py [--checkpoint DIR | --workdir RUN] [--out wavs/] [--json]

Two sets: the model's own voice saying sentences that are in no bank (needs Kokoro, see `tools/install_voices`), and
human readers it never heard (Debian's pocketsphinx-testdata). Frames come from the recording; the rows say what became
of them. "disturbed" frames are blurred and noisy, as an imperfect flow head gives them. Needs pesq, pystoi and what
`jaxtml.evals.judge` needs (Whisper tiny.en).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.config import VocoderConfig
from jaxtml.data.voices.registry import OWN_VOICE, synthesise
from jaxtml.errors import InputError
from jaxtml.evals.judge import Judge, count_errors
from jaxtml.model.spec import Params
from jaxtml.model.speech.vocoder import init_state, vocode
from jaxtml.stream.dmel import fine_log_mel, mel_filterbank
from jaxtml.stream.timebase import FINE_HOP, FINE_PER_MICRO_TURN, FINE_WINDOW, MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.train.vocoder.data import disturb
from jaxtml.train.vocoder.storage import load_vocoder

SENTENCES = (
    "The birch canoe slid on the smooth planks.", "Glue the sheet to the dark blue background.",
    "It is easy to tell the depth of a well.", "These days a chicken leg is a rare dish.",
    "Rice is often served in round bowls.", "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.", "The hogs were fed chopped corn and garbage.",
    "Four hours of steady work faced us.", "A large size in stockings is hard to sell.",
    "The boy was there when the sun rose.", "A rod is used to catch pink salmon.",
    "The source of the huge river is the clear spring.", "Kick the ball straight and follow through.",
    "Help the woman get back to her feet.", "A pot of tea helps to pass the evening.",
    "Smoky fires lack flame and heat.", "The soft cushion broke the man's fall.",
    "The salt breeze came across from the sea.", "The wagon moved on well oiled wheels.",
)  # fmt: skip  # Harvard sentences, lists 1 and 2 (IEEE 1969): phonetically balanced
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")

Speak = Callable[[np.ndarray], np.ndarray]


def own_voice() -> list[tuple[str, np.ndarray]]:
    return [(text, synthesise(OWN_VOICE, text).wave) for text in SENTENCES]


def human_voices() -> list[tuple[str, np.ndarray]]:
    if not LIBRIVOX.is_dir():
        raise InputError(f"{LIBRIVOX} is missing: apt-get install pocketsphinx-testdata")
    lines = re.findall(r"<s> (.*) </s> \((\S+)\)", (LIBRIVOX / "transcription").read_text())
    return [(text, soundfile.read(LIBRIVOX / f"{name}.wav", dtype="float32")[0]) for text, name in lines]


def on_grid(wave: np.ndarray) -> np.ndarray:
    """A micro-turn of silence on both sides, a whole number of micro-turns long."""
    return np.pad(wave, (MICRO_TURN_SAMPLES, MICRO_TURN_SAMPLES + -len(wave) % MICRO_TURN_SAMPLES))


def griffin_lim(frames: np.ndarray, iterations: int = 32) -> np.ndarray:
    """`[F, 80]` fine log-mels -> `[200 F]`: pseudo-inverse of the mel filters, then phases by fast Griffin-Lim
    (Perraudin et al. 2013, momentum 0.99) on the frames' own windows."""
    magnitude = np.maximum(10.0**frames @ np.linalg.pinv(mel_filterbank(FINE_WINDOW)), 0.0)
    window = np.hanning(FINE_WINDOW + 1)[:-1]
    side = (FINE_WINDOW - FINE_HOP) // 2
    count, hops = len(frames), FINE_WINDOW // FINE_HOP

    def overlapped(pieces: np.ndarray) -> np.ndarray:
        wave = np.zeros((count + hops - 1, FINE_HOP))
        for k in range(hops):
            wave[k : k + count] += pieces[:, k * FINE_HOP : (k + 1) * FINE_HOP]
        return wave.reshape(-1)

    weight = np.maximum(overlapped(np.tile(window**2, (count, 1))), 1e-2)
    places = np.arange(count)[:, None] * FINE_HOP + np.arange(FINE_WINDOW)

    def inverse(spectrum: np.ndarray) -> np.ndarray:
        return overlapped(np.fft.irfft(spectrum) * window) / weight

    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    before = np.zeros_like(phase)
    for _ in range(iterations):
        rebuilt = np.fft.rfft(inverse(magnitude * phase)[places] * window)
        phase = rebuilt + 0.99 * (rebuilt - before)
        phase /= np.abs(phase) + 1e-12
        before = rebuilt
    return inverse(magnitude * phase)[side:-side].astype(np.float32)


def streaming(config: VocoderConfig, params: Params) -> tuple[Speak, float]:
    """The trained vocoder, micro-turn by micro-turn as in service, and its milliseconds per micro-turn."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)  # as shipped
    step = jax.jit(vocode, static_argnums=0)

    def speak(frames: np.ndarray) -> np.ndarray:
        state, parts = init_state(config, 1), []
        for start in range(0, len(frames), FINE_PER_MICRO_TURN):
            state, wave = step(config, params, state, frames[None, start : start + FINE_PER_MICRO_TURN])
            parts.append(np.asarray(wave[0]))
        return np.concatenate(parts)

    frames = jnp.full((1, FINE_PER_MICRO_TURN, 80), -2.0)
    state = init_state(config, 1)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        state, wave = step(config, params, state, frames)
        wave.block_until_ready()
        times.append(time.perf_counter() - began)
    return speak, 1e3 * float(np.median(times))


def measure(
    pairs: list[tuple[str, np.ndarray]], rows: dict[str, Speak], judge: Judge, out: Path | None
) -> dict[str, dict[str, float]]:
    from pesq import pesq
    from pystoi import stoi

    results: dict[str, dict[str, float]] = {}
    for name, speak in rows.items():
        scores, wrong = [], []
        for number, (text, wave) in enumerate(pairs):
            wave = on_grid(wave)
            heard = wave if name == "original" else speak(fine_log_mel(wave))
            scores.append((pesq(SAMPLE_RATE, wave, heard, "wb"), stoi(wave, heard, SAMPLE_RATE)))
            wrong.append(count_errors(text, judge.transcribe(heard)))
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                soundfile.write(out / f"{number:02}_{name.replace(' ', '_').replace(',', '')}.wav", heard, SAMPLE_RATE)
        missed, words = np.sum(wrong, axis=0)
        quality, clarity = np.mean(scores, axis=0)
        results[name] = {"pesq": float(quality), "stoi": float(clarity), "wer_percent": 100 * float(missed / words)}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, default=SHIPPED, help="whose vocoder (default: the shipped one)")
    source.add_argument("--workdir", type=Path, help="of `jaxtml train vocoder`, instead")
    parser.add_argument("--out", type=Path, help="folder for the WAVs")
    parser.add_argument("--json", action="store_true", help="results as JSON on stdout")
    args = parser.parse_args()
    try:
        if args.workdir is not None:
            config, params = load_vocoder(args.workdir)
        else:
            config, params = load_checkpoint(args.checkpoint)
            params = params["vocoder"]
        speak, turn_ms = streaming(config.vocoder, params)
        judge = Judge.open()
        rows: dict[str, Speak] = {
            "original": lambda frames: frames,
            "Griffin-Lim 32": griffin_lim,
            "vocoder": speak,
            "vocoder, disturbed": lambda frames: speak(disturb(frames[None], np.random.default_rng(0))[0]),
        }
        report: dict[str, object] = {"turn_ms": turn_ms}
        for name, pairs in (("own voice", own_voice()), ("human", human_voices())):
            report[name] = measure(pairs, rows, judge, args.out / name.split()[0] if args.out else None)
    except InputError as error:
        print(f"bench_vocoder: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"one micro-turn (16 frames, batch 1): {turn_ms:.2f} ms")
    for name in ("own voice", "human"):
        print(f"\n{name:<20} PESQ-wb   STOI   WER %")
        table = report[name]
        assert isinstance(table, dict)
        for row, values in table.items():
            print(f"{row:<20} {values['pesq']:7.2f} {values['stoi']:6.3f} {values['wer_percent']:7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
