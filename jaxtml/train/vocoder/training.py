"""Trains the vocoder on the model's own voice: `jaxtml train vocoder --workdir DIR`.

One loop, visible from top to bottom. Batches are a function of (seed, step) and a checkpoint holds parameters,
optimizer and step, so that a run that was stopped continues with the numbers it would have had. A step takes 0.12 s of
a CPU core; 0.07 s where the process starts with
GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1, because XLA's
buffers then keep their pages from step to step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from orbax.checkpoint import v1 as ocp

from jaxtml.checkpoint.files import CONFIG
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.config import Config, VocoderConfig, from_json, to_json
from jaxtml.errors import InputError
from jaxtml.model.spec import Params, count_parameters, init_params
from jaxtml.model.speech.vocoder import PITCH_MIN, init_state, param_specs, predict_controls, render
from jaxtml.stream.timebase import FINE_HOP, SAMPLE_RATE
from jaxtml.train.vocoder.data import VocoderBatch, batch_at, prepare, recordings
from jaxtml.train.vocoder.loss import mel_loss, pitch_loss, stft_loss


@dataclass(frozen=True)
class VocoderTraining:
    """How the vocoder is trained. `warm` frames at a segment's start fill the convolutions and are not judged."""

    seed: int = 0
    rows: int = 8
    length: int = 80
    warm: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    mel_weight: float = 10.0
    pitch_weight: float = 0.2
    report_every: int = 50
    checkpoint_every: int = 500


def losses(
    cfg: VocoderConfig, how: VocoderTraining, params: Params, batch: VocoderBatch
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss to minimise and its terms, for one batch."""
    state = init_state(cfg, len(batch.frames))
    state["frame"] = batch.start  # every row its own noise
    # Every other row speaks with the recording's own pitch, so that the filters do not wait for it to be learnt; the
    # rest with the network's, so that they learn to live with its errors.
    told = jnp.arange(len(batch.frames))[:, None] % 2 == 0
    known_hz = jnp.where(told & (batch.voiced > 0), PITCH_MIN * jnp.exp2(batch.octaves), 0.0)
    _, controls = predict_controls(cfg, params, state, batch.frames, known_hz)
    _, wave = render(state, controls.hz, controls.taps)
    wave, target = wave[:, how.warm * FINE_HOP :], batch.wave[:, how.warm * FINE_HOP :]
    log_stft, convergence = stft_loss(wave, target)
    terms = {
        "log_stft": log_stft,
        "convergence": convergence,
        "mel": mel_loss(wave, target),
        "pitch": pitch_loss(controls.pitch[:, how.warm :], batch.octaves[:, how.warm :], batch.voiced[:, how.warm :]),
    }
    total = log_stft + convergence + how.mel_weight * terms["mel"] + how.pitch_weight * terms["pitch"]
    return total, terms


def optimizer(how: VocoderTraining, steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, how.learning_rate, min(how.warmup, steps // 10), steps, 0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=0.01))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    cfg: VocoderConfig, how: VocoderTraining, steps: int, state: dict[str, Any], batch: VocoderBatch
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """One update of `state` (`params`, `opt`)."""
    (total, terms), grads = jax.value_and_grad(partial(losses, cfg, how), has_aux=True)(state["params"], batch)
    updates, opt = optimizer(how, steps).update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt}, {"loss": total, **terms, "grad_norm": optax.tree.norm(grads)}


def train_vocoder(
    config: Config, banks: Sequence[Path | str], workdir: Path | str, steps: int, how: VocoderTraining | None = None
) -> Params:
    """Trains or resumes in `workdir` up to `steps` updates and returns the parameters (float32).

    Writes `checkpoints/<step>` (Orbax: params, opt), `config.json` (the resolved config) and `log.jsonl` (one line per
    report: step, seconds, loss by term).

    Raises:
      InputError: no bank there, no utterance of the assistant in it, or `workdir` holds a run of other settings.
    """
    how = how or VocoderTraining()
    workdir = Path(workdir).absolute()
    settings = {"vocoder": asdict(config.vocoder), "training": asdict(how), "steps": steps}
    _claim(workdir, config, settings)
    voice = prepare(recordings(banks))
    cfg = config.vocoder
    minutes = len(voice.wave) / SAMPLE_RATE / 60
    logging.info("vocoder: %d parameters, %.1f minutes of voice", count_parameters(param_specs(cfg))[0], minutes)

    params = init_params(param_specs(cfg), how.seed)
    state = {"params": params, "opt": optimizer(how, steps).init(params)}
    with ocp.training.Checkpointer(
        str(workdir / "checkpoints"),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),  # pyright: ignore[reportArgumentType]
    ) as saver:
        first = 0
        if saver.latest is not None:
            first = saver.latest.step
            state = saver.load(first, state)
            logging.info("vocoder: resumed at step %d", first)
        began, sums, seen = time.monotonic(), {}, 0
        for step in range(first, steps):
            batch = batch_at(voice, how.seed, step, how.rows, how.length)
            state, metrics = train_step(cfg, how, steps, state, batch)
            sums = jax.tree.map(jnp.add, sums, metrics) if seen else metrics
            seen += 1
            done = step + 1
            if done % how.report_every == 0 or done == steps:
                _report(workdir, done, steps, (time.monotonic() - began) / (done - first), sums, seen)
                sums, seen = {}, 0
            if done % how.checkpoint_every == 0 or done == steps:
                saver.save(done, state, force=True)
    return state["params"]


def trained(workdir: Path | str) -> tuple[Config, Params]:
    """The vocoder of a run's newest checkpoint, or of a model's checkpoint: config and parameters, float32.

    Raises:
      InputError: `workdir` is neither, or a run that has not reached its first checkpoint.
    """
    workdir = Path(workdir).absolute()
    if not (workdir / "training.json").is_file():  # the loop of the model writes none
        if (workdir / CONFIG).is_file() and not (workdir / "checkpoints").is_dir():
            config, params = load_checkpoint(workdir)
            return config, params["vocoder"]
        raise InputError(f"{workdir} holds no vocoder run: train one with `jaxtml train vocoder --workdir {workdir}`")
    config = from_json((workdir / CONFIG).read_text())
    with ocp.training.Checkpointer(str(workdir / "checkpoints")) as saver:
        if saver.latest is None:
            raise InputError(f"{workdir} has no checkpoint yet: let the training run on")
        # Loaded whole: the optimizer's tree depends on nothing but the parameters.
        params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), param_specs(config.vocoder))
        target = {"params": params, "opt": optimizer(VocoderTraining(), 1).init(params)}
        try:
            state = saver.load(saver.latest.step, target)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise InputError(f"{workdir}: the checkpoint of step {saver.latest.step} is damaged") from error
    return config, state["params"]


def _claim(workdir: Path, config: Config, settings: dict[str, Any]) -> None:
    """Makes `workdir`, or checks that it holds the same run."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "training.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{workdir} holds a vocoder run of other settings (see {path.name}): name a new --workdir")
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (workdir / CONFIG).write_text(to_json(config))


def _report(workdir: Path, done: int, steps: int, step_s: float, sums: dict[str, jax.Array], seen: int) -> None:
    """One progress line, and the same in `log.jsonl`; metrics are means since the line before."""
    means = {name: float(value) / seen for name, value in sums.items()}
    with (workdir / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": done, "step_s": round(step_s, 4), **means}) + "\n")
    terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    logging.info(
        "vocoder %d/%d  %s  %.2f s/step  ETA %.0f min", done, steps, terms, step_s, step_s * (steps - done) / 60
    )
