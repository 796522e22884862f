"""`jaxtml convert`: checkpoints in and out, at sizes that fit in memory.

A source is one of our checkpoints, a released Inkling directory, or the workdir of a training run (its newest step).
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxtml.config import Config
from jaxtml.convert.checkpoint import TOKENIZER, load_checkpoint, save_checkpoint
from jaxtml.convert.inkling import load_inkling, save_inkling
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, count, flatten


def read(source: str | Path) -> tuple[Config, Params]:
    """Config and float32 parameters of any checkpoint that we know. Raises `InputError` where it is none."""
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"no checkpoint directory {source}")
    if (source / "checkpoints").is_dir():
        from jaxtml.train.storage import latest

        config, _, params = latest(source)
        return config, params
    if any(source.glob("*.safetensors")):
        return load_inkling(source)
    return load_checkpoint(source)


def convert(
    source: str | Path, destination: str | Path, *, to: str = "orbax", dtype: str | None = None, verify: bool = False
) -> str:
    """Writes `source` to `destination` as an Orbax checkpoint of ours or in the released layout; returns a summary.

    Raises:
      InputError: the source is no checkpoint, the destination exists and is not empty, or `verify` found a difference.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists: name a new directory")
    config, params = read(source)
    if to == "hf":
        save_inkling(destination, config, params, dtype or "bfloat16")
    else:
        tokenizer = source / TOKENIZER
        save_checkpoint(destination, config, params, dtype, tokenizer if tokenizer.is_file() else None)
    total, _ = count(InteractionModel(config).specs())
    done = f"{source} -> {destination} ({to}): {config.name}, {total:,} parameters"
    return f"{done}; {_verify(params, destination, to, dtype)}" if verify else done


def _verify(params: Params, destination: Path, to: str, dtype: str | None) -> str:
    """Reads the result back; what the format holds must be equal to the source in the dtype it was written in."""
    written = jnp.dtype(dtype or ("bfloat16" if to == "hf" else "float32"))
    config, result = read(destination)
    table, back = dict(flatten(InteractionModel(config).specs())), dict(flatten(result))
    compared = 0
    for path, array in flatten(params):
        if to == "hf" and table[path].released is None:
            continue
        if not np.array_equal(np.asarray(array).astype(written), np.asarray(back[path]).astype(written)):
            raise InputError(f"{destination} differs from its source at {path}")
        compared += 1
    return f"verified, {compared} parameters equal"
