"""Saves parameters as a checkpoint of ours."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtml.checkpoint.files import CONFIG, TOKENIZER
from jaxtml.config import Config, to_json
from jaxtml.model.spec import Params


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
