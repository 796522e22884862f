"""What a training run is on disk: who may go on with it, its newest checkpoint, and the state that it begins with.

Orbax v1, one layout for any mesh and any number of processes: every process writes and reads the parts of its own
devices. Called by `train.loop`.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, TOKENIZER
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.source import place_parameters, spec_table
from jaxtml.checkpoint.warm_start import WarmStart
from jaxtml.config import Config, TrainConfig, from_json, to_json
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import partition_specs
from jaxtml.model.spec import Params, ParamSpec
from jaxtml.parallel.mesh import TRAIN
from jaxtml.train.step import TrainState, make_train_step

MADE_FROM = "data.txt"
# What may change when a run resumes: how long it is, how often it writes, and how its work is cut up.
FREE = ("steps", "checkpoint_every", "sample_every", "remat", "accumulate", "transport", "capacity")


def checkpointer(workdir: Path) -> ocp.training.Checkpointer:
    """Keeps the two newest checkpoints."""
    policy = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(
        str((workdir / RUN_CHECKPOINTS).absolute()),
        preservation_policy=policy,  # pyright: ignore[reportArgumentType]
    )


def shapes(model: InteractionModel, mesh: Mesh | AbstractMesh | None = None) -> dict[str, Any]:
    """Shape, dtype and place of each parameter: on `mesh`; if None, on the one that is set, or on the first device.

    What the optimizer does not touch stays float32: the router's bias moves by less than bfloat16 can tell.
    """
    where, dtype = model.placement.mesh, model.config.train.param_dtype
    if mesh is None and where.devices > 1:
        mesh = jax.sharding.get_mesh()

    def shape(spec: ParamSpec, place: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, place)
        return jax.ShapeDtypeStruct(spec.shape, dtype if spec.trained else "float32", sharding=sharding)

    return jax.tree.map(shape, model.specs(), partition_specs(model.specs(), where, TRAIN))


def load(saver: ocp.training.Checkpointer, workdir: Path, step: int, model: InteractionModel) -> TrainState:
    """The state after `step`, laid out for `model`, whatever mesh wrote it.

    Raises:
      InputError: the checkpoint is damaged, or of another model.
    """
    init, _ = make_train_step(model)
    one = SingleDeviceSharding(jax.devices()[0])

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """With a mesh of devices: moments come with an abstract one, counters and single devices with none."""
        sharding = one
        if model.placement.mesh.devices > 1:
            sharding = NamedSharding(jax.sharding.get_mesh(), getattr(leaf.sharding, "spec", PartitionSpec()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    target = jax.tree.map(with_sharding, jax.eval_shape(init, shapes(model)))
    try:
        return saver.load(step, target)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise InputError(
            f"{workdir}: the checkpoint of step {step} is damaged, or of another version of the model: "
            f"name a new --workdir ({type(error).__name__})"
        ) from error


def start_from(directory: Path, model: InteractionModel, data: Path) -> Params:
    """The parameters of a checkpoint that a run of `model` on `data` can begin with, where and as `shapes` says, read
    by each process for its own devices: one of ours of the same sizes, or a released one with the same backbone.
    Prediction heads that it lacks begin anew.

    Raises:
      InputError: it is neither, or its tokenizer is not that of the data.
    """
    source = open_checkpoint(directory)
    if not isinstance(source, ReleasedCheckpoint):
        held, wanted = (
            {path: spec.shape for path, spec in spec_table(c).items()} for c in (source.config, model.config)
        )
        other = sorted(path for path in held.keys() | wanted.keys() if held.get(path) != wanted.get(path))
        other = [path for path in other if not path.startswith("mtp/")]  # heads may be new, or left out
        if other:
            raise InputError(f"{directory} cannot start this run: its {other[0]} is of another size (see its {CONFIG})")
    source = WarmStart(source, model.config, model.config.train.seed)
    if not (directory / TOKENIZER).is_file():
        logging.warning("%s has no %s: nobody can say whether that of %s fits", directory, TOKENIZER, data)
    elif (directory / TOKENIZER).read_bytes() != (data / TOKENIZER).read_bytes():
        raise InputError(f"{directory} cannot start this run: its {TOKENIZER} is not that of {data}")
    return place_parameters(source, shapes(model))


def claim(workdir: Path, config: Config, data: Path, made_from: str) -> None:
    """Makes `workdir`, or checks that its run is one of this config and this data; every process calls it.

    A run that has not come to its first checkpoint has nothing to lose: another one takes its place.
    """
    path, source = workdir / CONFIG, workdir / MADE_FROM
    if any((workdir / RUN_CHECKPOINTS).glob("[0-9]*")):
        if _identity(from_json(path.read_text())) != _identity(config):
            raise InputError(f"{workdir} holds a run of another config (see {path.name}): name a new --workdir")
        if source.read_text() != made_from:
            raise InputError(f"{workdir} holds a run on other data than {data} now is: name a new --workdir")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("everyone has read what is there")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config))
        source.write_text(made_from)
        shutil.copyfile(data / TOKENIZER, workdir / TOKENIZER)


def _identity(config: Config) -> Config:
    """What may not change when a run resumes: the config, with one value for what is `FREE`."""
    usual = TrainConfig()
    free = {name: getattr(usual, name) for name in FREE}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **free))
