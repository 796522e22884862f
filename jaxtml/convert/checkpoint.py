"""Our checkpoint directories: an Orbax v1 checkpoint of the parameters with `config.json` and `tokenizer.json` in it.

Written to a directory beside and renamed, so a directory with the right name is always whole. Called by `train`,
`converse`, `serve`, `evals` and `jaxtml convert`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.config import Config, from_json, to_json, validate
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, flatten

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def save_checkpoint(
    directory: str | Path,
    config: Config,
    params: Params,
    dtype: str | None = None,
    tokenizer_path: str | Path | None = None,
) -> None:
    """Writes a checkpoint, replacing one of the same name; `dtype` ("bfloat16", "float32") casts, None keeps."""
    from orbax.checkpoint import v1 as ocp  # half a second, which only saving and loading pay

    directory = Path(os.path.abspath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    try:
        ocp.save(str(fresh), jax.tree.map(lambda a: jnp.asarray(a, dtype or a.dtype), params))
        (fresh / CONFIG).write_text(to_json(config))
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, fresh / TOKENIZER)
        if directory.exists():
            old = directory.with_name(f"{fresh.name}.old")
            directory.rename(old)
            fresh.rename(directory)
            shutil.rmtree(old)
        else:
            fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_config(directory: str | Path) -> Config:
    """The config of a checkpoint directory. Raises `InputError` where it is not one."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}")
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory} is not a jaxtml checkpoint: it has no {CONFIG}")
    try:
        config = from_json((directory / CONFIG).read_text())
        validate(config)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{directory / CONFIG} is not the config of a jaxtml checkpoint: {error}") from error
    return config


def load_checkpoint(
    directory: str | Path, dtype: str = "float32", shapes: dict[str, Any] | None = None
) -> tuple[Config, Params]:
    """Reads a checkpoint onto the default device, cast to `dtype`; or, with `shapes`, a tree of
    `jax.ShapeDtypeStruct`s, to where and as what these say, each process the parts of its own devices.

    Raises:
      InputError: the directory is missing, is no checkpoint, is damaged, or its arrays are not those of its config (the
        first that differs is named with both shapes).
    """
    config = load_config(directory)
    from orbax.checkpoint import v1 as ocp

    directory = Path(os.path.abspath(directory))
    if (directory / "checkpoints").is_dir():
        raise InputError(
            f"{directory} is a training run: make a checkpoint of it with `jaxtml convert {directory} DST`"
        )
    specs = InteractionModel(config).specs()
    try:
        stored: Any = ocp.metadata(str(directory)).metadata
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise InputError(_damaged(directory, error)) from error
    _check_same(directory, specs, stored)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.dtype(dtype), sharding=sharding), specs)
    try:
        return config, ocp.load(str(directory), target if shapes is None else shapes)
    except Exception as error:
        raise InputError(_damaged(directory, error)) from error


def _damaged(directory: Path, error: Exception) -> str:
    text = str(error).strip()
    detail = text.splitlines()[0][:160] if text else type(error).__name__
    return f"checkpoint {directory} is damaged or incomplete, copy it again: {detail}"


def _check_same(directory: Path, specs: dict[str, Any], stored: Any) -> None:
    """Compares names and shapes with the config's table."""
    wanted = {path: tuple(spec.shape) for path, spec in flatten(specs)}
    held = {path: tuple(leaf.shape) for path, leaf in flatten(stored)} if isinstance(stored, dict) else {}
    for path in sorted(wanted.keys() | held.keys()):
        if wanted.get(path) != held.get(path):
            told = [f"{table[path]}" if path in table else "no such parameter" for table in (held, wanted)]
            raise InputError(
                f"checkpoint {directory} is of another size than its {CONFIG}: {path} is {told[0]} in the checkpoint, "
                f"{told[1]} by the config"
            )
