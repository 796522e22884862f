"""Trains the vocoder on the model's own voice: `jaxtml train vocoder --workdir DIR`. Read `train_vocoder` first.

A batch is a function of (seed, step), and a checkpoint holds parameters, optimizer and step. A run that was stopped
therefore resumes with the numbers that it would have had.

A step takes 0.12 s of a CPU core. It takes 0.07 s if the process starts with
`GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1`: XLA's buffers
then keep their pages from step to step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
import optax
from absl import logging

from jaxtml.config import Config, VocoderConfig
from jaxtml.errors import InputError, join_names
from jaxtml.model.spec import Params, count_parameters, init_params
from jaxtml.model.speech.vocoder import PITCH_MIN, init_state, param_specs, predict_controls, render
from jaxtml.stream.timebase import FINE_HOP, SAMPLE_RATE
from jaxtml.strict_json import dumps
from jaxtml.train.optimizer import rate_at
from jaxtml.train.parameters import check_finite
from jaxtml.train.start import Start
from jaxtml.train.storage import compare
from jaxtml.train.vocoder.data import VocoderBatch, join_recordings, make_batch, read_recordings
from jaxtml.train.vocoder.loss import mel_loss, pitch_loss, stft_loss
from jaxtml.train.vocoder.optimizer import optimizer, schedule
from jaxtml.train.vocoder.storage import FILES, FOLDERS, claim, load_state, load_vocoder, open_checkpointer

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class VocoderTraining:
    """How the vocoder is trained."""

    seed: int = 0
    """Seed of the initial parameters and of the batches; at least 0."""

    rows: int = 8
    """Segments in a batch; at least 1."""

    length: int = 80
    """Fine frames (12.5 ms each) of a segment: 80 are one second. It must exceed `warm`."""

    warm: int = 16
    """Number of first frames of a segment that the loss leaves out: there the convolutions lack earlier frames."""

    learning_rate: float = 2e-3
    """The highest learning rate of AdamW; above 0."""

    warmup: int = 100
    """Steps over which the learning rate rises from 0; at most a tenth of the run."""

    mel_weight: float = 10.0
    """Weight of the L1 of log-mels (log10), which is small beside the STFT terms."""

    pitch_weight: float = 0.2
    """Weight of the pitch loss, a Kullback-Leibler divergence in nats."""

    report_every: int = 50
    """Steps between progress lines."""

    checkpoint_every: int = 500
    """Steps between checkpoints: a minute on one CPU core."""


class VocoderState(TypedDict):
    """The state of a run, as its checkpoints have it."""

    params: Params
    opt: optax.OptState


def train_vocoder(
    config: Config,
    banks: Sequence[Path | str],
    workdir: Path | str,
    steps: int,
    training: VocoderTraining | None = None,
    *,
    start_from: Path | None = None,
) -> Params:
    """Trains or resumes in `workdir` up to `steps` updates and returns the parameters (float32).

    Args:
      config: its `vocoder` is trained; the whole config is kept beside the checkpoints.
      banks: speech banks with utterances of the assistant.
      workdir: made if it is not there, see `jaxtml.train.vocoder.storage`.
      steps: steps of the whole run, also if it resumes; the schedule of the learning rate depends on this number.
      training: the other settings; None for the defaults.
      start_from: a vocoder run or a checkpoint whose vocoder a new run begins with; None: the parameters are
        initialised.

    Raises:
      InputError: no bank there, no utterance of the assistant in it, `workdir` holds a run of other settings or a
        damaged one, or the vocoder of `start_from` does not fit or has NaN.
    """
    training = training or VocoderTraining()
    workdir = Path(workdir).absolute()
    recordings = read_recordings(banks)  # before the folder is claimed: a start without data leaves nothing behind
    first_params = _read_vocoder(start_from, config) if start_from else None
    with Start(workdir, FOLDERS, FILES) as start, ExitStack() as opened:
        claim(workdir, config, {"vocoder": asdict(config.vocoder), "training": asdict(training), "steps": steps})
        voice = join_recordings(recordings)
        specs = param_specs(config.vocoder)
        minutes = len(voice.wave) / SAMPLE_RATE / 60
        logging.info("vocoder: %d parameters, %.1f minutes of voice", count_parameters(specs)[0], minutes)

        params = first_params or init_params(specs, training.seed)
        state: VocoderState = {"params": params, "opt": _optimizer(training, steps).init(params)}
        checkpointer = opened.enter_context(open_checkpointer(workdir))
        first = 0
        if checkpointer.latest is not None:
            first = checkpointer.latest.step
            state = load_state(checkpointer, workdir, first, state)
            logging.info("vocoder: resumed at step %d of %d", first, steps)
            if start_from:
                logging.warning(
                    "--start-from %s: no effect, because %s resumed with its own parameters; to begin with others, "
                    "name a new --workdir", start_from, workdir,
                )  # fmt: skip
        began_s = time.monotonic()
        unreported: list[Metrics] = []
        for done in range(first + 1, steps + 1):
            batch = make_batch(voice, training.seed, done - 1, training.rows, training.length)
            state, metrics = train_step(config.vocoder, training, steps, state, batch)
            start.succeeded()
            unreported.append(metrics)
            if done % training.report_every == 0 or done == steps:
                step_s = (time.monotonic() - began_s) / (done - first)
                rate = rate_at(schedule(training.learning_rate, training.warmup, steps), done - 1)
                _report(workdir, done, steps, step_s, rate, unreported)
                unreported = []
            if done % training.checkpoint_every == 0 or done == steps:
                checkpointer.save(done, state, force=True)
    return state["params"]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    config: VocoderConfig, training: VocoderTraining, steps: int, state: VocoderState, batch: VocoderBatch
) -> tuple[VocoderState, Metrics]:
    """Returns the state after one batch, and the metrics: the loss, its terms and the norm of the gradients."""
    (total, terms), grads = jax.value_and_grad(partial(loss_fn, config, training), has_aux=True)(state["params"], batch)
    updates, opt = _optimizer(training, steps).update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": total, **terms, "grad_norm": optax.tree.norm(grads)}
    return {"params": params, "opt": opt}, metrics  # pyright: ignore[reportReturnType]


def loss_fn(
    config: VocoderConfig, training: VocoderTraining, params: Params, batch: VocoderBatch
) -> tuple[jax.Array, Metrics]:
    """Returns the loss of one batch, and its terms by name."""
    state = init_state(config, len(batch.frames))
    state["frame"] = batch.start  # every row has its own noise
    # Every other row speaks with the recording's own pitch, so that the filters can learn before the pitch is learnt.
    # The other rows speak with the network's pitch, so that the filters learn to live with its errors.
    known = jnp.arange(len(batch.frames))[:, None] % 2 == 0
    known_hz = jnp.where(known & (batch.voiced > 0), PITCH_MIN * jnp.exp2(batch.octaves), 0.0)
    _, controls = predict_controls(config, params, state, batch.frames, known_hz)
    _, wave = render(state, controls.hz, controls.taps)
    warm = training.warm
    wave, target = wave[:, warm * FINE_HOP :], batch.wave[:, warm * FINE_HOP :]
    log_stft, convergence = stft_loss(wave, target)
    terms = {
        "log_stft": log_stft,
        "convergence": convergence,
        "mel": mel_loss(wave, target),
        "pitch": pitch_loss(controls.pitch[:, warm:], batch.octaves[:, warm:], batch.voiced[:, warm:]),
    }
    total = log_stft + convergence + training.mel_weight * terms["mel"] + training.pitch_weight * terms["pitch"]
    return total, terms


def _read_vocoder(directory: Path, config: Config) -> Params:
    """Returns the vocoder's parameters of a vocoder run or of a checkpoint.

    Raises:
      InputError: there is no vocoder, its sizes are not those of `config`, or it has NaN.
    """
    found, params = load_vocoder(directory)
    if found.vocoder != config.vocoder:
        differences = compare(found.vocoder, config.vocoder, "vocoder")
        names = join_names([f"{field} is {theirs} there and {ours} in this run" for field, theirs, ours in differences])
        raise InputError(f"{directory} cannot start this run: its vocoder has other sizes ({names})")
    check_finite({"vocoder": params}, str(directory))
    return params


def _optimizer(training: VocoderTraining, steps: int) -> optax.GradientTransformation:
    return optimizer(training.learning_rate, training.warmup, steps)


def _report(
    workdir: Path, done: int, steps: int, step_s: float, learning_rate: float, metrics: Sequence[Metrics]
) -> None:
    """Writes a progress line, and a line with the same figures to `log.jsonl`.

    The figures are means over `metrics`, which holds the metrics of each step since the last line.
    """
    means = {name: float(sum(step[name] for step in metrics)) / len(metrics) for name in metrics[0]}
    with (workdir / "log.jsonl").open("a") as log:
        log.write(dumps({"step": done, "step_s": round(step_s, 4), "learning_rate": learning_rate, **means}) + "\n")
    terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    eta_min = step_s * (steps - done) / 60
    logging.info(
        "vocoder %d/%d  %s  rate %.3g  %.2f s/step  ETA %.0f min", done, steps, terms, learning_rate, step_s, eta_min
    )
