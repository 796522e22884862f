"""`jaxtml logits`: the text logits of a checkpoint for given tokens, so that anyone can check the model.

Axes: B sequences, T tokens, V vocabulary. Also called by `convert.verification`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.source import ParameterSource, place_parameters, read_parameters
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.placement import Placement, all_gather_parameters, partition_specs
from jaxtml.model.spec import Params, ParamSpec
from jaxtml.parallel.mesh import BATCH_AXES, TRAIN, MeshShape, make_mesh
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.timebase import N_MELS
from jaxtml.stream.tokens import PositionKind


def token_logits(checkpoint: str | Path, tokens: str | Path, out: str | Path, mesh: str | None = None) -> None:
    """Writes the logits of a checkpoint, float32 `[B, T, V]`, to the .npy file `out`.

    Args:
      checkpoint: the directory of the checkpoint.
      tokens: a .npy file of token ids, integers `[B, T]` or `[T]`.
      out: the file to write, under exactly this name. The command has checked the ending of the name.
      mesh: how the devices share the model, such as "expert=8"; None: the first device alone.

    Raises:
      InputError: there is no such checkpoint or token file; the ids have another type or shape, or are outside the
        vocabulary; the mesh does not fit; or `out` cannot be written.
    """
    shape = MeshShape() if mesh is None else MeshShape.parse(mesh)
    ids = _read_ids(tokens)
    source = open_checkpoint(checkpoint)
    vocab = source.config.backbone.vocab_size
    if ids.size == 0 or ids.min() < 0 or ids.max() >= vocab:
        raise InputError(f"{tokens}: token ids must lie in 0..{vocab - 1}, and there must be at least one")
    if shape.devices == 1:
        logits = text_logits(source.config, read_parameters(source), ids)
    else:
        logits = _logits_on_mesh(source, ids, shape)
    if not np.isfinite(logits).all():
        logging.warning(
            "the logits have NaN or infinite values; `jaxtml convert %s DST --verify` names the tensors that have some",
            checkpoint,
        )
    try:
        with open(out, "wb") as file:
            np.save(file, logits)
    except OSError as error:
        reason = error.strerror or "the disk is full, or a quota is used up"  # NumPy's error has no number
        raise InputError(f"cannot write {out}: {reason}; name another file or folder") from error


def text_logits(config: Config, params: Params, ids: np.ndarray) -> np.ndarray:
    """Returns the logits, float32 `[B, T, V]`, for token ids `[B, T]` that are all text (teacher forcing)."""
    return np.asarray(_jitted_forward(config)(params, jnp.asarray(ids, jnp.int32)))


@lru_cache(maxsize=2)
def _jitted_forward(config: Config) -> Callable[[Params, jax.Array], jax.Array]:
    """Returns `_forward` of a model. A verification calls it twice for equal models, and compiles it once."""
    return jax.jit(partial(_forward, InteractionModel(config)))


def _forward(model: InteractionModel, params: Params, ids: jax.Array) -> jax.Array:
    """Returns the logits `[B, T, V]` of ids `[B, T]`; on a mesh, those of this device's rows."""
    shape = ids.shape
    inputs = Inputs(
        kind=jnp.full(shape, PositionKind.TEXT, jnp.uint8),
        ids=ids,
        bins=jnp.zeros((*shape, N_MELS), jnp.uint8),
        clock=jnp.zeros((*shape, CLOCK_FEATURES), jnp.float32),
        patches=jnp.zeros((shape[0], 0, 2, 40, 40, 3), jnp.float32),
    )
    hidden, _ = model.hidden(params, inputs, jnp.dtype(jnp.float32))
    return model.logits(params, hidden)


def _logits_on_mesh(source: ParameterSource, ids: np.ndarray, shape: MeshShape) -> np.ndarray:
    """Returns what `text_logits` does. Each device reads its part of the parameters alone, as in training."""
    mesh = make_mesh(shape)
    model = InteractionModel(source.config, Placement(shape))
    table = model.serving_specs()
    layout, rows = partition_specs(table, shape, TRAIN), PartitionSpec(BATCH_AXES)

    def device_logits(params: Params, ids: jax.Array) -> jax.Array:
        float32 = jnp.dtype(jnp.float32)
        unembed = {"unembed": params["unembed"]}
        unembed = all_gather_parameters(unembed, {"unembed": table["unembed"]}, shape, float32)
        return _forward(model, {**model.all_gather_trunk(params, float32), **unembed}, ids)

    def read_shape(spec: ParamSpec, part: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, np.dtype(np.float32), sharding=NamedSharding(mesh, part))

    padded = np.pad(ids, ((0, -len(ids) % shape.batch_shards), (0, 0))).astype(np.int32)
    with jax.set_mesh(mesh):
        params = place_parameters(source, jax.tree.map(read_shape, table, layout))
        split = jax.make_array_from_callback(padded.shape, NamedSharding(mesh, rows), padded.__getitem__)
        run = jax.shard_map(device_logits, in_specs=(layout, rows), out_specs=rows, check_vma=False)
        logits = jax.jit(lambda params, ids: jax.sharding.reshard(run(params, ids), PartitionSpec()))(params, split)
    return np.asarray(logits)[: len(ids)]


def _read_ids(path: str | Path) -> np.ndarray:
    """Reads token ids as an array `[B, T]`."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"no token file {path}: write the token ids with numpy.save, and name that file") from error
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a .npy file: write the token ids with numpy.save") from error
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(f"{path}: give one integer array [B, T] or [T] of token ids, written with numpy.save")
    return np.atleast_2d(ids)
