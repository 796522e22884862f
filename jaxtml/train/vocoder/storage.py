"""A vocoder run on disk: its settings, its checkpoints, and reading the trained vocoder back.

In the run's folder: `training.json` (all settings; a run resumes only with the same settings), `config.json`,
`checkpoints/<step>` (Orbax: `params`, `opt`) and `log.jsonl`. Called by `jaxtml.train.vocoder.training`; `load_vocoder`
also by `jaxtml train --vocoder` and by tools.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, VOCODER_SETTINGS
from jaxtml.checkpoint.orbax.source import load_checkpoint, load_config
from jaxtml.config import Config, to_json
from jaxtml.errors import InputError, join_names
from jaxtml.model.spec import Params
from jaxtml.model.speech.vocoder import param_specs
from jaxtml.strict_json import dumps
from jaxtml.train.storage import DATA_DIGEST, check_folder, compare, newest_step, write_atomically
from jaxtml.train.vocoder.optimizer import optimizer

SETTINGS = VOCODER_SETTINGS
FOLDERS, FILES = (RUN_CHECKPOINTS,), (SETTINGS, CONFIG, "log.jsonl")


def claim(workdir: Path, config: Config, settings: dict[str, Any]) -> None:
    """Makes `workdir`, or checks that the run in it has the same settings.

    A run without a checkpoint has nothing to lose, so another run may take its place.

    Raises:
      InputError: `workdir` holds a run of other settings or of a whole model, or cannot be used.
    """
    check_folder(workdir, FOLDERS, FILES)
    path = workdir / SETTINGS
    if newest_step(workdir) is not None:
        if (workdir / DATA_DIGEST).exists():
            raise InputError(f"{workdir} holds a run of a whole model: name a new --workdir")
        differences = compare(_read_settings(path), settings)
        if differences:
            names = join_names([str(difference) for difference in differences])
            same_sizes = not any(difference.field.startswith("vocoder.") for difference in differences)
            train_on = ", with --start-from this run to train its vocoder on" if same_sizes else ""
            raise InputError(
                f"{workdir} holds a vocoder run of other settings ({names}): no setting can change in a run, and the "
                "course of the learning rate depends on the steps; give the settings of the run, or name a new "
                f"--workdir{train_on}"
            )
    else:  # a run of a whole model that was killed before its first checkpoint would still own the folder
        (workdir / DATA_DIGEST).unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dumps(settings, indent=2) + "\n")
    write_atomically(workdir / CONFIG, to_json(config))


def _read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings of a run. Raises `InputError`, which names the file, if it is missing or damaged."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):  # ValueError: no text, or no JSON
        settings = None
    if not isinstance(settings, dict):
        raise InputError(
            f"{path} is missing or damaged, and the vocoder run in its folder cannot resume without it: restore this "
            "file, or name a new --workdir"
        )
    return settings


def open_checkpointer(workdir: Path) -> ocp.training.Checkpointer:
    """Opens the checkpoints of a run. The two newest are kept."""
    policy = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(
        str(workdir / RUN_CHECKPOINTS),
        preservation_policy=policy,  # pyright: ignore[reportArgumentType]
    )


def load_vocoder(directory: Path | str) -> tuple[Config, Params]:
    """Returns config and float32 vocoder parameters of a vocoder run's newest checkpoint, or of a model's checkpoint.

    Raises:
      InputError: `directory` is neither, or a run that has not reached its first checkpoint.
    """
    directory = Path(directory).absolute()
    if not (directory / SETTINGS).is_file():
        if (directory / CONFIG).is_file() and not (directory / RUN_CHECKPOINTS).is_dir():
            config, params = load_checkpoint(directory, may_be_older=True)  # the vocoder is the same since 0.1
            return config, params["vocoder"]
        if (directory / RUN_CHECKPOINTS).is_dir():
            raise InputError(
                f"{directory} is a run of a whole model and holds no vocoder run: make a checkpoint of it with "
                f"`jaxtml convert {directory} DST`, and name DST"
            )
        missing = "does not exist and" if not directory.exists() else "is no checkpoint and"
        raise InputError(
            f"{directory} {missing} holds no vocoder run: name a checkpoint, or the --workdir of a run of "
            "`jaxtml train vocoder`"
        )
    config = load_config(directory)
    with open_checkpointer(directory) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"{directory} has no checkpoint yet: wait until the training run has saved one")
        state = load_state(checkpointer, directory, checkpointer.latest.step, _state_shapes(config))
    return config, state["params"]


def load_state(checkpointer: ocp.training.Checkpointer, directory: Path, step: int, like: Any) -> Any:
    """Returns the state of a run after `step`, as a tree like `like`.

    Raises:
      InputError: the checkpoint is damaged.
    """
    try:
        return checkpointer.load(step, like)
    except Exception as error:  # Orbax and TensorStore raise many kinds of exception
        folder = directory / RUN_CHECKPOINTS
        has_earlier = any(int(name) < step for name in os.listdir(folder) if name.isdecimal())
        earlier = f"remove {folder / str(step)} to use the checkpoint before it, or " if has_earlier else ""
        raise InputError(
            f"{directory}: the checkpoint of step {step} is damaged ({type(error).__name__}): {earlier}train a vocoder "
            "in a new --workdir"
        ) from error


def _state_shapes(config: Config) -> dict[str, Any]:
    """Returns a state to load a checkpoint into. Every setting of the optimizer gives the same tree, so any will do."""
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), param_specs(config.vocoder))
    return {"params": params, "opt": optimizer(1.0, 1, 1).init(params)}
