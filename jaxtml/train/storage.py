"""A training run on disk: the check that a folder belongs to this run, and the run's checkpoints.

Checkpoints are Orbax v1, in one layout for any mesh and any number of processes: every process writes and reads the
parts of its own devices. Called by `jaxtml.train.loop`.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, TOKENIZER
from jaxtml.config import Config, TrainConfig, from_json, to_json
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.train.parameters import parameter_shapes
from jaxtml.train.step import TrainState, make_train_step

DATA_DIGEST = "data.txt"  # digest of the dataset that a run trains on
# Fields of `TrainConfig` that may change when a run resumes: how long it is, how often it writes, and how the work is
# cut up.
MAY_CHANGE = ("steps", "checkpoint_every", "sample_every", "remat", "accumulate", "transport", "capacity")


def claim(workdir: Path, config: Config, data: Path, data_digest: str) -> None:
    """Makes `workdir`, or checks that the run in it has this config and this data. Every process calls it.

    A run without a checkpoint has nothing to lose, so another run may take its place.

    Raises:
      InputError: `workdir` holds a run of another config or on other data.
    """
    config_path, digest_path = workdir / CONFIG, workdir / DATA_DIGEST
    if any((workdir / RUN_CHECKPOINTS).glob("[0-9]*")):
        if _fixed_part(from_json(config_path.read_text())) != _fixed_part(config):
            raise InputError(f"{workdir} holds a run of another config (see {CONFIG}): name a new --workdir")
        if digest_path.read_text() != data_digest:
            raise InputError(f"{workdir} holds a run on other data than {data} has now: name a new --workdir")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes have read the run's folder")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        config_path.write_text(to_json(config))
        digest_path.write_text(data_digest)
        shutil.copyfile(data / TOKENIZER, workdir / TOKENIZER)


def _fixed_part(config: Config) -> Config:
    """Returns the config with defaults in the fields that may change when a run resumes."""
    defaults = TrainConfig()
    changes = {name: getattr(defaults, name) for name in MAY_CHANGE}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


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
