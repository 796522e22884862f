"""A vocoder run on disk: its settings, its checkpoints, and reading the trained vocoder back.

In the run's folder: `training.json` (all settings; a run resumes only with the same settings), `config.json`,
`checkpoints/<step>` (Orbax: `params`, `opt`) and `log.jsonl`. Called by `jaxtml.train.vocoder.training`; `load_vocoder`
also by `jaxtml train --vocoder` and by tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS
from jaxtml.checkpoint.orbax.source import load_checkpoint
from jaxtml.config import Config, from_json, to_json
from jaxtml.errors import InputError
from jaxtml.model.spec import Params
from jaxtml.model.speech.vocoder import param_specs
from jaxtml.strict_json import dumps
from jaxtml.train.vocoder.optimizer import optimizer

SETTINGS = "training.json"  # a run of the whole model has no such file


def claim(workdir: Path, config: Config, settings: dict[str, object]) -> None:
    """Makes `workdir`, or checks that the run in it has the same settings.

    Raises:
      InputError: `workdir` holds a run of other settings.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / SETTINGS
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{workdir} holds a vocoder run of other settings (see {SETTINGS}): name a new --workdir")
    path.write_text(dumps(settings, indent=2) + "\n")
    (workdir / CONFIG).write_text(to_json(config))


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
            config, params = load_checkpoint(directory)
            return config, params["vocoder"]
        raise InputError(
            f"{directory} holds no vocoder run: train one with `jaxtml train vocoder --workdir {directory}`"
        )
    config = from_json((directory / CONFIG).read_text())
    with ocp.training.Checkpointer(str(directory / RUN_CHECKPOINTS)) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"{directory} has no checkpoint yet: wait until the training run has saved one")
        step = checkpointer.latest.step
        try:
            state = checkpointer.load(step, _state_shapes(config))
        except Exception as error:  # Orbax and TensorStore raise many kinds of exception
            raise InputError(f"{directory}: the checkpoint of step {step} is damaged") from error
    return config, state["params"]


def _state_shapes(config: Config) -> dict[str, Any]:
    """Returns a state to load a checkpoint into. Every setting of the optimizer gives the same tree, so any will do."""
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), param_specs(config.vocoder))
    return {"params": params, "opt": optimizer(1.0, 1, 1).init(params)}
