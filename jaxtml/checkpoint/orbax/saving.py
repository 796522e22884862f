"""Saves parameters that are in memory as a jaxtml checkpoint. Called by tools and tests.

A checkpoint is written to a folder beside its place and then renamed. Therefore a folder with the right name is always
complete. A checkpoint that does not fit into memory is written with `checkpoint.orbax.sink` instead.
"""

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
    """Writes a checkpoint, and replaces a checkpoint of the same name.

    Args:
      directory: the directory to write.
      config: the config of the model.
      params: the tree of parameters.
      dtype: the dtype to write, "float32" or "bfloat16"; None keeps the dtype of each parameter.
      tokenizer_path: a `tokenizer.json` that is copied into the checkpoint; None leaves the tokenizer out.
    """
    from orbax.checkpoint import v1 as ocp  # takes half a second, so only callers that save pay for the import

    directory = Path(os.path.abspath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    try:
        ocp.save(str(fresh), jax.tree.map(lambda array: jnp.asarray(array, dtype or array.dtype), params))
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
