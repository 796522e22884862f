"""Any checkpoint that the project knows, opened by its directory. Called by `session`, `train` and `convert`."""

from __future__ import annotations

from pathlib import Path

from jaxtml.checkpoint.inkling.directory import INDEX
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import ParameterSource, first_device_shapes, place_parameters
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.spec import Params


def open_checkpoint(directory: str | Path) -> ReleasedCheckpoint | OrbaxCheckpoint:
    """Any checkpoint that we know as a source. Raises `InputError` where it is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}")
    if any(directory.glob("*.safetensors")) or (directory / INDEX).is_file():
        return ReleasedCheckpoint(directory)
    return OrbaxCheckpoint(directory)


def read_checkpoint(directory: str | Path, dtype: str = "float32") -> tuple[Config, Params]:
    """Config and parameters of any checkpoint that we know, on the first device. Raises `InputError` as
    `open_checkpoint`."""
    return read_parameters(open_checkpoint(directory), dtype)


def read_parameters(source: ParameterSource, dtype: str = "float32") -> tuple[Config, Params]:
    return source.config, place_parameters(source, first_device_shapes(source.config, dtype))
