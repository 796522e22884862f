"""Any checkpoint that the project knows, opened by its directory. Called by `session`, `train` and `convert`."""

from __future__ import annotations

from pathlib import Path

from jaxtml.checkpoint.inkling.source import INDEX, ReleasedCheckpoint
from jaxtml.checkpoint.orbax_source import OrbaxCheckpoint, on_one_device
from jaxtml.checkpoint.source import Source, placed
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.spec import Params

SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"


def opened(directory: str | Path) -> ReleasedCheckpoint | OrbaxCheckpoint:
    """Any checkpoint that we know as a source. Raises `InputError` where it is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}")
    if any(directory.glob("*.safetensors")) or (directory / INDEX).is_file():
        return ReleasedCheckpoint(directory)
    return OrbaxCheckpoint(directory)


def read(directory: str | Path, dtype: str = "float32") -> tuple[Config, Params]:
    """Config and parameters of any checkpoint that we know, on the first device. Raises `InputError` as `opened`."""
    return in_memory(opened(directory), dtype)


def in_memory(source: Source, dtype: str = "float32") -> tuple[Config, Params]:
    return source.config, placed(source, on_one_device(source.config, dtype))
