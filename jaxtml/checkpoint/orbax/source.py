"""Our checkpoint directories: an Orbax v1 checkpoint of the parameters with `config.json` and `tokenizer.json` in it.

Written to a directory beside and renamed, so a directory with the right name is always whole. Read array by array, in
part where a part is wanted, whatever wrote them. Called by `train`, `converse`, `serve`, `evals` and `jaxtml convert`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, STATE
from jaxtml.checkpoint.orbax.arrays import open_array, uncached_context
from jaxtml.checkpoint.source import Index, first_device_shapes, place_parameters, spec_table
from jaxtml.config import Config, from_json, validate
from jaxtml.errors import InputError
from jaxtml.model.spec import Params


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


class OrbaxCheckpoint:
    """One of our checkpoints, or the newest step of a training run, as a `checkpoint.source.Source`.

    Raises:
      InputError: it is none, or its arrays are not those of its config (the first that differs is named with both
        shapes).
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(os.path.abspath(directory))
        self.config: Config = load_config(directory)
        self.step: int | None = None
        folder, prefix = self.directory, ""
        if (self.directory / RUN_CHECKPOINTS).is_dir():
            steps = [int(step.name) for step in (self.directory / RUN_CHECKPOINTS).iterdir() if step.name.isdecimal()]
            if not steps:
                raise InputError(f"{directory} has no checkpoint yet: let the training run on")
            self.step = max(steps)
            folder, prefix = self.directory / RUN_CHECKPOINTS / str(self.step), "params/"
        self.specs, context = spec_table(self.config), uncached_context()
        held = {name.removeprefix(prefix) for name in self._names(folder / STATE) if name.startswith(prefix)}
        opened = {path: self._opened(folder / STATE, prefix + path, context) for path in sorted(held)}
        for path in sorted(self.specs.keys() | opened.keys()):
            found = opened[path].shape if path in opened else None
            wanted = self.specs[path].shape if path in self.specs else None
            if found != wanted:
                told = ["no such parameter" if shape is None else f"{shape}" for shape in (found, wanted)]
                raise InputError(
                    f"checkpoint {directory} is of another size than its {CONFIG}: {path} is {told[0]} in the "
                    f"checkpoint, {told[1]} by the config"
                )
        self.arrays = opened

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype.numpy_dtype

    def holds(self, path: str) -> bool:
        return True

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """What one file holds."""
        return self.arrays[path].chunk_layout.write_chunk.shape

    def read(self, path: str, index: Index) -> np.ndarray:
        try:
            return self.arrays[path][index].read().result()
        except ValueError as error:  # all that TensorStore raises
            raise self._damaged(error) from error

    def _names(self, state: Path) -> list[str]:
        """The arrays of the tree that Orbax has in `state`."""
        try:
            entries = json.loads((state / "_METADATA").read_text())["tree_metadata"].values()
            return ["/".join(key["key"] for key in entry["key_metadata"]) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error

    def _opened(self, state: Path, path: str, context: ts.Context) -> Any:
        try:
            return open_array(state, path, context)
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> InputError:
        said = " ".join(str(error).split())[:160] or type(error).__name__
        advice = "copy it again" if self.step is None else "the run may have replaced this step, try again"
        return InputError(f"checkpoint {self.directory} is damaged or incomplete, {advice}: {said}")


def load_checkpoint(
    directory: str | Path, dtype: str = "float32", shapes: dict[str, Any] | None = None
) -> tuple[Config, Params]:
    """Reads a checkpoint onto the default device, cast to `dtype`; or, with `shapes`, a tree of
    `jax.ShapeDtypeStruct`s, to where and as what these say, each process the parts of its own devices.

    Raises:
      InputError: the directory is missing, is no checkpoint, is damaged, or its arrays are not those of its config.
    """
    if (Path(directory) / RUN_CHECKPOINTS).is_dir():
        raise InputError(
            f"{directory} is a training run: make a checkpoint of it with `jaxtml convert {directory} DST`"
        )
    source = OrbaxCheckpoint(directory)
    return source.config, place_parameters(source, shapes or first_device_shapes(source.config, dtype))
