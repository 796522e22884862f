"""Opens any checkpoint by its directory. Called by `session`, `train` and `convert`."""

from __future__ import annotations

from pathlib import Path

from jaxtml.checkpoint.contents import is_release
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import read_parameters
from jaxtml.config import Config
from jaxtml.model.spec import Params


def open_checkpoint(directory: str | Path, *, may_be_older: bool = False) -> ReleasedCheckpoint | OrbaxCheckpoint:
    """Opens a jaxtml checkpoint, a training run or a released Inkling checkpoint as a parameter source.

    `may_be_older` says whether a model that version 0.1 trained is accepted (see `OrbaxCheckpoint`).

    Raises:
      InputError: the directory is missing, is no such checkpoint, or the checkpoint is damaged.
    """
    directory = Path(directory)
    return (
        ReleasedCheckpoint(directory)
        if is_release(directory)
        else OrbaxCheckpoint(directory, may_be_older=may_be_older)
    )


def read_checkpoint(directory: str | Path, dtype: str = "float32") -> tuple[Config, Params]:
    """Reads the config and all parameters of any checkpoint, the parameters onto the first device as `dtype`.

    Raises:
      InputError: for the same reasons as `open_checkpoint`.
    """
    source = open_checkpoint(directory)
    return source.config, read_parameters(source, dtype)
