"""The training loop: `jaxtml train CONFIG --workdir DIR --data DIR`. Read it top to bottom.

A batch is a function of (seed, step) and a checkpoint holds parameters, moments and the step: a run that was killed
goes on with the numbers it would have had. In `workdir`: `checkpoints/<step>` (Orbax), `config.json`, `tokenizer.json`,
`data.txt` (a digest of what the rows are made from), `log.jsonl` (a line per report), `tensorboard/`, `samples/<step>/`
(conversations with unseen voices).
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp
from tensorboardX import SummaryWriter

from jaxtml.config import Config, from_json, to_json
from jaxtml.convert.checkpoint import CONFIG, TOKENIZER, load_checkpoint
from jaxtml.data.cache import CachedRows, digest
from jaxtml.data.pipeline import Rows, batches
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, count, flatten, init_params
from jaxtml.stream.text import TextCodec
from jaxtml.train.samples import Sampler
from jaxtml.train.step import TrainState, make_train_step

REPORT_EVERY = 20
BANK, CACHE, MADE_FROM = "bank", "cache", "data.txt"


def train(
    config: Config,
    workdir: Path,
    data: Path,
    *,
    workers: int = 1,
    vocoder: Params | None = None,
    start_from: Path | None = None,
) -> TrainState:
    """Trains or resumes in `workdir` up to `config.train.steps` updates.

    Args:
      config: the resolved config; resuming with another one is refused, but for `train.steps` and `*_every`.
      workdir: made if it is not there.
      data: from `jaxtml data`: `bank/`, `tokenizer.json` and, where there is one, `cache/`.
      workers: processes that make batches in advance.
      vocoder: trained vocoder parameters to carry in the checkpoints.
      start_from: a checkpoint directory whose parameters a new run begins with, its vocoder too; fresh moments.

    Raises:
      InputError: no data there, `workdir` holds a run of another config or on other data, or `start_from` is of
        another size or has another tokenizer.
    """
    codec = TextCodec.load(data / TOKENIZER)
    if codec.size > config.duplex.control_base:
        raise InputError(f"{data / TOKENIZER} has {codec.size} entries, {config.name} {config.duplex.control_base}")
    rows = Rows.open(config, codec, data / BANK)
    made_from = digest(rows)
    if (data / CACHE).is_dir():
        rows = CachedRows.open(config, data / CACHE, rows)
        made_from += f" cache of {rows.count}"
    _claim(workdir, config, data, made_from)
    model = InteractionModel(config)
    total, active = count(model.specs())
    logging.info("%s: %.2fM parameters, %.2fM active per token", config.name, total / 1e6, active / 1e6)

    init, step = make_train_step(model)
    compiled = jax.jit(step, donate_argnums=0)
    policy = ocp.training.preservation_policies.LatestN(2)
    saver = ocp.training.Checkpointer(
        str((workdir / "checkpoints").absolute()),
        preservation_policy=policy,  # pyright: ignore[reportArgumentType]
    )
    if saver.latest is not None:
        first = saver.latest.step
        state = _load(saver, workdir, first, model)
        logging.info("resumed at step %d", first)
    else:
        first = 0
        params = _start(start_from, model, data) if start_from else init_params(model.specs(), config.train.seed)
        if vocoder is None and not start_from:
            logging.warning("no vocoder is carried along: what the checkpoints say is noise until one is (--vocoder)")
        state = init({**params, "vocoder": vocoder} if vocoder is not None else params)

    tokens_per_step = config.train.batch * config.data.tokens
    steps = config.train.steps
    feed = batches(rows, config.train.batch, start=first, workers=workers)
    board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first)
    pending: list[dict[str, jax.Array]] = []
    sampler: Sampler | None = None
    began = reported = time.monotonic()
    try:
        for done in range(first + 1, steps + 1):
            state, metrics = compiled(state, next(feed))
            pending.append(metrics)
            if done % REPORT_EVERY == 0 or done == steps:
                means = {name: float(np.mean([float(m[name]) for m in pending])) for name in metrics}
                now = time.monotonic()
                rate = len(pending) * tokens_per_step / (now - reported)
                eta_s = (steps - done) * (now - began) / (done - first)
                _report(workdir, board, done, steps, means, rate, eta_s)
                pending, reported = [], now
                if means["skipped"] == 1.0:
                    raise FloatingPointError(f"no finite gradient in {REPORT_EVERY} steps up to {done}: lower the rate")
            if done % config.train.checkpoint_every == 0 or done == steps:
                # Without `force` Orbax leaves out a checkpoint while it still writes the one before: maybe the last.
                saver.save_async(done, state, force=True)
            if done % config.train.sample_every == 0 or done == steps:
                sampler = sampler or Sampler(config, state.params, codec, data / BANK)
                said = sampler.run(state.params, workdir / "samples" / f"{done:06}")
                board.add_text("samples", said, done)
                logging.info("samples at step %d\n%s", done, said)
    finally:
        feed.close()
        board.close()
        saver.close()
    return state


def latest(workdir: Path) -> tuple[Config, TextCodec, Params]:
    """Config, tokenizer and newest parameters of a run. Raises `InputError` where there is no checkpoint yet."""
    if not (workdir / CONFIG).is_file():
        raise InputError(f"{workdir} holds no training run")
    config = from_json((workdir / CONFIG).read_text())
    with ocp.training.Checkpointer(str((workdir / "checkpoints").absolute())) as saver:
        if saver.latest is None:
            raise InputError(f"{workdir} has no checkpoint yet: let the training run on")
        state = _load(saver, workdir, saver.latest.step, InteractionModel(config))
    return config, TextCodec.load(workdir / TOKENIZER), state.params


def _start(directory: Path, model: InteractionModel, data: Path) -> Params:
    """The parameters of a checkpoint that a run of `model` on `data` can begin with."""
    theirs, params = load_checkpoint(directory)
    held, wanted = ({path: spec.shape for path, spec in flatten(m.specs())} for m in (InteractionModel(theirs), model))
    other = sorted(path for path in held.keys() | wanted.keys() if held.get(path) != wanted.get(path))
    if other:
        raise InputError(f"{directory} cannot start this run: its {other[0]} is of another size (see its {CONFIG})")
    if (directory / TOKENIZER).read_bytes() != (data / TOKENIZER).read_bytes():
        raise InputError(f"{directory} cannot start this run: its {TOKENIZER} is not that of {data}")
    return params


def _load(saver: ocp.training.Checkpointer, workdir: Path, step: int, model: InteractionModel) -> TrainState:
    init, _ = make_train_step(model)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.float32), model.specs())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), jax.eval_shape(init, params)
    )
    try:
        return saver.load(step, target)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise InputError(
            f"{workdir}: the checkpoint of step {step} is damaged, or of another version of the model: "
            f"name a new --workdir ({type(error).__name__})"
        ) from error


def _claim(workdir: Path, config: Config, data: Path, made_from: str) -> None:
    """Makes `workdir`, or checks that its run is one of this config and this data.

    A run that has not come to its first checkpoint has nothing to lose: another one takes its place.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, source = workdir / CONFIG, workdir / MADE_FROM
    if any((workdir / "checkpoints").glob("[0-9]*")):
        if _identity(json.loads(path.read_text())) != _identity(json.loads(to_json(config))):
            raise InputError(f"{workdir} holds a run of another config (see {path.name}): name a new --workdir")
        if source.read_text() != made_from:
            raise InputError(f"{workdir} holds a run on other data than {data} now is: name a new --workdir")
    path.write_text(to_json(config))
    source.write_text(made_from)
    shutil.copyfile(data / TOKENIZER, workdir / TOKENIZER)


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What may not change when a run resumes."""
    free = ("steps", "checkpoint_every", "sample_every")
    return {**config, "train": {k: v for k, v in config["train"].items() if k not in free}}


def _report(
    workdir: Path, board: SummaryWriter, done: int, steps: int, means: dict[str, float], rate: float, eta_s: float
) -> None:
    """One progress line, the same in `log.jsonl` and in TensorBoard; metrics are means since the line before."""
    with (workdir / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": done, "tokens_per_s": round(rate), **{k: round(v, 5) for k, v in means.items()}}))
        log.write("\n")
    for name, value in {**means, "tokens_per_s": rate}.items():
        board.add_scalar(f"train/{name}", value, done)
    terms = "  ".join(
        f"{name} {means[name]:.3f}" for name in ("loss", "gate", "heard", "text", "flow", "heard_right", "text_right")
    )
    logging.info(
        "%d/%d  %s  norm %.2f  load %.2f..%.2f  %.0f tokens/s  ETA %d:%02d",
        done,
        steps,
        terms,
        means["grad_norm"],
        means["load_min"],
        means["load_max"],
        rate,
        *divmod(round(eta_s / 60), 60),
    )
