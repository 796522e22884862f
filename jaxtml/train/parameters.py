"""The parameters that a training run begins with, and how parameters lie on the devices of a run.

A run begins with initial parameters or with the parameters of a checkpoint. Each process makes or reads the parts of
its own devices. Called by `jaxtml.train.loop`; `parameter_shapes` also by `jaxtml.train.storage` and `jaxtml.plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxtml.checkpoint.files import CONFIG, TOKENIZER
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.source import place_parameters, spec_table
from jaxtml.checkpoint.tokenizer import missing_tokenizer
from jaxtml.checkpoint.warm_start import WarmStart
from jaxtml.config import Config
from jaxtml.errors import InputError, join_names
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import partition_specs
from jaxtml.model.spec import Params, ParamSpec, flatten, init_params
from jaxtml.parallel.mesh import TRAIN

_NO_VOCODER = "no trained vocoder: the voice of this run's checkpoints is noise; give one with --vocoder"
# Parts of the parameter tree, by the names that people know, in the order in which the model uses them.
_PARTS = {
    "embed": "token embedding",
    "audio": "audio tower",
    "visual": "vision tower",
    "clock": "clock",
    "own": "embedding of the model's own speech",
    "unembed": "unembedding",
    "mtp": "prediction heads",
    "flow": "flow head",
    "draft": "drafter",
    "vocoder": "vocoder",
}


def parameter_shapes(model: InteractionModel, mesh: Mesh | AbstractMesh | None = None) -> dict[str, Any]:
    """Returns shape, dtype and sharding of each parameter of the master copy, in the shape of the parameter tree.

    The router's correction bias is float32 whatever `param_dtype` is. A step can move it by less than the spacing of
    bfloat16 numbers.

    Args:
      model: the model.
      mesh: where the parameters lie. None: on the mesh that `jax.set_mesh` has set, or on the first device if the model
        runs on one device.
    """
    mesh_shape, dtype = model.placement.mesh, model.config.train.param_dtype
    if mesh is None and mesh_shape.devices > 1:
        mesh = jax.sharding.get_mesh()

    def shape(spec: ParamSpec, partition: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, partition)
        return jax.ShapeDtypeStruct(spec.shape, dtype if spec.trained else "float32", sharding=sharding)

    return jax.tree.map(shape, model.specs(), partition_specs(model.specs(), mesh_shape, TRAIN))


Warn = Callable[[str], object]
"""Takes a line for the user about how a run begins."""


def first_parameters(
    model: InteractionModel, data: Path, vocoder: Params | None, start_from: Path | None, warn: Warn = logging.warning
) -> Params:
    """Returns the parameters that a new run begins with, with the dtypes and shardings of `parameter_shapes`.

    Args:
      model: the model.
      data: the run's data, with its tokenizer.
      vocoder: trained vocoder parameters, which take the place of the model's own.
      start_from: a checkpoint to take the parameters from; None: they are initialised.
      warn: takes a line for each part of the model that begins untrained.

    Raises:
      InputError: the checkpoint does not fit (see `checkpoint_parameters`), or `vocoder` has NaN or infinities.
    """
    shapes = parameter_shapes(model)
    if start_from:
        params = checkpoint_parameters(start_from, model, data, has_vocoder=vocoder is not None, warn=warn)
    else:
        params = init_params(model.specs(), model.config.train.seed, jax.tree.map(lambda s: s.sharding, shapes))
        if vocoder is None:
            warn(_NO_VOCODER)
    if vocoder is not None:
        check_finite({"vocoder": vocoder}, "the vocoder of --vocoder")
        params = {**params, "vocoder": vocoder}
    return jax.tree.map(lambda array, shape: _place(array, shape.sharding).astype(shape.dtype), params, shapes)


def checkpoint_parameters(
    directory: Path,
    model: InteractionModel,
    data: Path,
    *,
    has_vocoder: bool = False,
    warn: Warn = logging.warning,
) -> Params:
    """Returns the parameters of a checkpoint, with which a run of `model` begins.

    Their dtypes and shardings are those of `parameter_shapes`. The checkpoint is one of ours whose parameters have the
    same shapes, or a released one with the same backbone. Prediction heads that the checkpoint lacks get initial
    values. A release lacks more than that, for example the flow head: a warning names the parts that begin untrained.

    Args:
      directory: the checkpoint.
      model: the model of the run.
      data: the run's data, with its tokenizer.
      has_vocoder: whether the run takes its vocoder from elsewhere.
      warn: takes the warnings.

    Raises:
      InputError: `directory` is no such checkpoint, its tokenizer is not the tokenizer of `data`, or a parameter is not
        finite.
    """
    source = open_checkpoint(directory, may_be_older=True)
    if not isinstance(source, ReleasedCheckpoint):
        differing = _differing_shape(source.config, model.config)
        if differing:
            raise InputError(
                f"{directory} cannot start this run: its {differing} is of another size (see its {CONFIG})"
            )
    source = WarmStart(source, model.config, model.config.train.seed)
    missing = missing_tokenizer(directory)
    if missing is not None:
        warn(f"{missing}; until then nothing says whether the tokenizer of {data} fits the weights")
    elif (directory / TOKENIZER).read_bytes() != (data / TOKENIZER).read_bytes():
        raise InputError(
            f"{directory} cannot start this run: its {TOKENIZER} differs from the tokenizer of {data}. "
            f"`jaxtml data CONFIG --out {data} --tokenizer {directory}` gives it to the data, and keeps the speech bank"
        )
    _warn_of_new_parts(directory, source, has_vocoder, warn)
    params = place_parameters(source, parameter_shapes(model))
    check_finite(params, str(directory))
    return params


def check_finite(params: Params, place: str) -> None:
    """Raises `InputError`, which names the parameters, if some of `params` have NaN or infinities.

    `place` says where the parameters come from. Parameters may be sharded: every process gets the same answer.
    """
    finite = jax.jit(lambda tree: jax.tree.map(lambda array: jnp.isfinite(array).all(), tree))(params)
    broken = [path for path, is_finite in flatten(finite) if not is_finite]
    if broken:
        raise InputError(
            f"{place} cannot start this run: NaN or infinity in {join_names(broken)}; take an earlier or an undamaged "
            "checkpoint"
        )


def _warn_of_new_parts(directory: Path, source: WarmStart, has_vocoder: bool, warn: Warn) -> None:
    """Warns of the parts of the model that `directory` lacks. They begin with initial values."""
    lacking = [path for path in source.specs if not source.holds(path)]
    new = {path.split("/")[0] for path in lacking if path != "flow/w_before" or "flow/w_in" in lacking}
    names = [name for part, name in _PARTS.items() if part in new and not (part == "vocoder" and has_vocoder)]
    if names:
        warn(f"{directory} has no {', '.join(names)}: training begins with new ones")
    if "vocoder" in new and not has_vocoder:
        warn(_NO_VOCODER)


def _differing_shape(a: Config, b: Config) -> str | None:
    """Returns the path of a parameter whose shape differs between two configs, or None. Ignores prediction heads."""
    shapes_a, shapes_b = ({path: spec.shape for path, spec in spec_table(config).items()} for config in (a, b))
    paths = sorted(shapes_a.keys() | shapes_b.keys())
    differing = (path for path in paths if shapes_a.get(path) != shapes_b.get(path) and not path.startswith("mtp/"))
    return next(differing, None)


def _place(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Puts an array onto the devices of `sharding`, those of other processes included, unless it is there already."""
    if array.sharding == sharding:
        return array
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
