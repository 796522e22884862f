"""A training run on disk: the check that a folder belongs to this run, and the run's checkpoints.

Checkpoints are Orbax v1, in one layout for any mesh and any number of processes: every process writes and reads the
parts of its own devices. Called by `jaxtml.train.loop`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, TOKENIZER, VOCODER_SETTINGS
from jaxtml.config import Config, from_json, to_json
from jaxtml.errors import InputError, join_names
from jaxtml.model.interaction import InteractionModel
from jaxtml.strict_json import dumps
from jaxtml.train.optimizer import rate_at, schedule
from jaxtml.train.parameters import parameter_shapes
from jaxtml.train.step import TrainState, make_train_step

DATA_DIGEST = "data.txt"  # digest of the dataset that a run trains on
CHANGES = "changes.jsonl"  # the settings that a run changed on its way
# Fields of `TrainConfig` that may change when a run resumes: how long it is, how often it writes, and how the work is
# cut up. `serve` may change too: training does not read it.
MAY_CHANGE = ("steps", "checkpoint_every", "sample_every", "remat", "accumulate", "transport", "capacity")
# Fields of `TrainConfig` that may change if the user says so (`--change-run`). They decide neither the shape of an
# array nor which row a step reads, so the run can go on. `batch` is not among them: row `r` of step `s` is row
# `s * batch + r` of the data, and with another batch a run would repeat rows or leave rows out. Neither is `seed`, nor
# the dtype of parameters and moments.
CHANGED_ON_PURPOSE = (
    *("learning_rate", "warmup", "decay", "weight_decay", "clip_norm", "norm_limit", "beta2", "compute_dtype"),
    *("bias_rate", "z_loss", "flow_weight", "gate_weight", "heard_weight", "text_weight", "mtp_weight"),
)
FOLDERS = (RUN_CHECKPOINTS, "tensorboard", "samples", "profile")
FILES = (CONFIG, DATA_DIGEST, CHANGES, TOKENIZER, "log.jsonl")


class Difference(NamedTuple):
    """A field that differs between the config of a run and the config that is asked for."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} is {self.before} in the run and {self.now} now"


def claim(workdir: Path, config: Config, data: Path, data_digest: str, *, change_run: bool = False) -> None:
    """Makes `workdir`, or checks that the run in it has this config and this data. Every process calls it.

    A run without a checkpoint has nothing to lose, so another run may take its place.

    Args:
      workdir: the folder of the run.
      config: the config that is asked for.
      data: the folder of the data, with its tokenizer.
      data_digest: the digest of the dataset.
      change_run: whether the fields `CHANGED_ON_PURPOSE` may differ from those of the run.

    Raises:
      InputError: `workdir` holds a run of another config, on other data or with more steps done, or cannot be used.
    """
    check_folder(workdir, FOLDERS, FILES)
    step = newest_step(workdir)
    if step is not None:
        if (workdir / VOCODER_SETTINGS).is_file():
            raise InputError(f"{workdir} holds a run of the vocoder alone: name a new --workdir")
        before = _read_config(workdir / CONFIG)
        differences = _check_config(workdir, before, config, change_run)
        if _read(workdir / DATA_DIGEST) != data_digest:
            raise InputError(f"{workdir} holds a run on other data than {data} has now: name a new --workdir")
        _check_steps(workdir, before, config, step)
    else:
        differences = []
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes have read the run's folder")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if step is None:  # else a vocoder run that was killed before its first checkpoint would still own the folder
            (workdir / VOCODER_SETTINGS).unlink(missing_ok=True)
        write_atomically(workdir / CONFIG, to_json(config))
        write_atomically(workdir / DATA_DIGEST, data_digest)
        shutil.copyfile(data / TOKENIZER, workdir / TOKENIZER)
        for difference in differences:
            logging.warning("from step %d on, %s", (step or 0) + 1, difference)
            with (workdir / CHANGES).open("a") as changes:
                changes.write(dumps({"step": step, **difference._asdict()}) + "\n")


def check_folder(workdir: Path, folders: Sequence[str], files: Sequence[str]) -> None:
    """Raises `InputError` if `workdir` or one of its parts exists as something else, or may not be written."""
    existing = next(place for place in (workdir, *workdir.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"--workdir {workdir}: {existing} is a file: name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--workdir {workdir}: {existing} may not be written: name a folder of your own")
    for name in folders:
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise InputError(f"{workdir / name} is a file, and a run needs a folder there: name a new --workdir")
    for name in files:
        if (workdir / name).is_dir():
            raise InputError(f"{workdir / name} is a folder, and a run needs a file there: name a new --workdir")


def newest_step(workdir: Path) -> int | None:
    """Returns the newest step of which a run has a checkpoint; None if the run has no checkpoint."""
    folders = (workdir / RUN_CHECKPOINTS).glob("[0-9]*")
    return max((int(folder.name) for folder in folders if folder.name.isdecimal()), default=None)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file. A full disk or a killed process leaves the old file or the new one, never a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def compare(before: Any, now: Any, path: str = "") -> list[Difference]:
    """Returns the fields that differ between two values of one dataclass, or between two dictionaries.

    `path` is the path of the values in the whole, for example "train".
    """
    before, now = (dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for value in (before, now))  # pyright: ignore[reportArgumentType]
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [Difference(path, before, now)]
    names = [*before, *(name for name in now if name not in before)]
    prefix = f"{path}." if path else ""
    return [d for name in names for d in compare(before.get(name), now.get(name), f"{prefix}{name}")]


def _check_config(workdir: Path, before: Config, config: Config, change_run: bool) -> list[Difference]:
    """Returns what differs between the run and `config` besides what may always differ.

    Raises:
      InputError: a field differs that may not, or that may differ only with `change_run`.
    """
    free = {f"train.{name}" for name in MAY_CHANGE}
    purpose = {f"train.{name}" for name in CHANGED_ON_PURPOSE}
    found = [d for d in compare(before, config) if d.field not in free and not d.field.startswith("serve.")]
    fixed = [d for d in found if d.field not in purpose]
    if fixed:
        names = join_names([str(d) for d in fixed])
        raise InputError(
            f"{workdir} holds a run of another config ({names}): these fields decide the model, its numbers or the "
            "order of the data, and cannot change in a run; give the values of the run, or name a new --workdir"
        )
    if found and not change_run:
        names = join_names([str(d) for d in found])
        raise InputError(
            f"{workdir} holds a run of another config ({names}): give the values of the run, add --change-run to go "
            "on with the new values, or name a new --workdir"
        )
    if change_run and not found:
        logging.info("--change-run has no effect: the run has these settings already")
    return found


def _check_steps(workdir: Path, before: Config, config: Config, step: int) -> None:
    """Says where the learning rate jumps because the run becomes longer or shorter.

    Raises:
      InputError: the run has done more steps than `config` asks for.
    """
    steps = config.train.steps
    if steps < step:
        raise InputError(
            f"{workdir} has done {step} steps, and {steps} are asked for: give at least {step} with --steps, or name a "
            "new --workdir"
        )
    if steps == step:
        logging.info("%s has done all of its %d steps: give more with --steps to train on", workdir, steps)
        return
    planned, now = (rate_at(schedule(train), step) for train in (before.train, config.train))
    last = rate_at(schedule(before.train), step - 1)
    if not math.isclose(planned, now, rel_tol=0.01) and not math.isclose(last, now, rel_tol=0.01):
        logging.warning(
            "the learning rate of the resumed run goes from %.3g at step %d to %.3g at step %d, because its course "
            "depends on train.steps (%d before, %d now) and on the other settings of the schedule; to train on at a "
            "low rate, begin a new --workdir with --start-from this run, a lower "
            "train.learning_rate and a short train.warmup",
            last, step, now, step + 1, before.train.steps, steps,
        )  # fmt: skip


def _read(path: Path) -> str:
    """Returns the text of a file of a run. Raises `InputError` if the file is missing or is no text."""
    try:
        return path.read_text()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is missing or damaged, and the run in its folder cannot resume without it: restore this file, or "
            "name a new --workdir"
        ) from error


def _read_config(path: Path) -> Config:
    """Returns the config of a run. Raises `InputError`, which names the file, if it is missing or damaged."""
    text = _read(path)
    try:
        return from_json(text)
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): restore this file, or name a new --workdir") from error


def open_checkpointer(workdir: Path) -> ocp.training.Checkpointer:
    """Opens the checkpoints of a run. The two newest are kept."""
    policy = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(
        str((workdir / RUN_CHECKPOINTS).absolute()),
        preservation_policy=policy,  # pyright: ignore[reportArgumentType]
    )


def load_state(
    checkpointer: ocp.training.Checkpointer, workdir: Path, step: int, model: InteractionModel
) -> TrainState:
    """Returns the state after `step`, sharded for the mesh of `model`. Another mesh may have written the checkpoint.

    Raises:
      InputError: the checkpoint is damaged, or of another model.
    """
    init, _ = make_train_step(model)
    single = SingleDeviceSharding(jax.devices()[0])

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Gives a leaf the devices of the mesh that `jax.set_mesh` has set. `eval_shape` puts moments on an abstract
        mesh, and counters on no mesh."""
        sharding = single
        if model.placement.mesh.devices > 1:
            sharding = NamedSharding(jax.sharding.get_mesh(), getattr(leaf.sharding, "spec", PartitionSpec()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    target = jax.tree.map(with_sharding, jax.eval_shape(init, parameter_shapes(model)))
    try:
        return checkpointer.load(step, target)
    except Exception as error:  # Orbax and TensorStore raise many kinds of exception
        raise InputError(
            f"{workdir}: the checkpoint of step {step} is damaged, or belongs to another version of the model: "
            f"name a new --workdir ({type(error).__name__})"
        ) from error
