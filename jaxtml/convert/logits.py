"""`jaxtml logits`: the text logits of a checkpoint for given tokens, so that anyone can check the model.

Axes: B sequences, T tokens, V vocabulary. Also called by `convert.verification`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.spec import Params
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.timebase import N_MELS
from jaxtml.stream.tokens import PositionKind


def token_logits(checkpoint: str | Path, tokens: str | Path, out: str | Path) -> None:
    """Writes the logits of a checkpoint, float32 `[B, T, V]`, to the .npy file `out`.

    Args:
      checkpoint: the directory of the checkpoint.
      tokens: a .npy file of token ids, integers `[B, T]` or `[T]`.
      out: the file to write.

    Raises:
      InputError: there is no such checkpoint or token file; the ids have another type or shape, or are outside the
        vocabulary; or `out` cannot be written.
    """
    ids = _read_ids(tokens)
    config, params = read_checkpoint(checkpoint)
    vocab = config.backbone.vocab_size
    if ids.size == 0 or ids.min() < 0 or ids.max() >= vocab:
        raise InputError(f"{tokens}: token ids must lie in 0..{vocab - 1}, and there must be at least one")
    logits = text_logits(config, params, ids)
    try:
        with open(out, "wb") as file:
            np.save(file, logits)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error


def text_logits(config: Config, params: Params, ids: np.ndarray) -> np.ndarray:
    """Returns the logits, float32 `[B, T, V]`, for token ids `[B, T]` that are all text (teacher forcing)."""
    model = InteractionModel(config)

    def forward(params: Params, ids: jax.Array) -> jax.Array:
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

    return np.asarray(jax.jit(forward)(params, jnp.asarray(ids, jnp.int32)))


def _read_ids(path: str | Path) -> np.ndarray:
    """Reads token ids as an array `[B, T]`."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"no token file {path}") from error
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a .npy file: write the token ids with numpy.save") from error
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(f"{path}: token ids must be an integer array [B, T] or [T]")
    return np.atleast_2d(ids)
