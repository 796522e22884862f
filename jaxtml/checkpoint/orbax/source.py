"""A jaxtml checkpoint, or the newest step of a training run, as a parameter source.

The checkpoint is read array by array, and only the parts that are asked for. It does not matter whether Orbax, the
trainer or `jaxtml convert` wrote it. `checkpoint.files` names what is in the directory. Called by `checkpoint.opening`
and the trainer of the vocoder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

import numpy as np
import tensorstore as ts

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, STATE, check_not_pointer
from jaxtml.checkpoint.orbax.arrays import open_array, uncached_context
from jaxtml.checkpoint.source import Index, read_parameters, spec_table
from jaxtml.config import Config, from_json, validate
from jaxtml.errors import InputError
from jaxtml.model.spec import Params, initial_values

_SINCE_0_2 = ("draft/", "flow/w_before")
"""Parameters, or the beginnings of their names, that models of version 0.1 lack. Those models generated their speech
frame by frame, in another layout of the micro-turn."""

_LONGEST_CAUSE = 160  # characters of a library's error that a message repeats


class OrbaxCheckpoint:
    """A `ParameterSource` of a jaxtml checkpoint, or of the newest step of a training run.

    Args:
      directory: the checkpoint or the training run.
      may_be_older: whether a model of version 0.1 is accepted. Training can begin with it; it cannot run as it is.

    Attributes:
      step: the step of a training run; None for a checkpoint.

    Raises:
      InputError: the directory is no jaxtml checkpoint, the checkpoint is damaged, or its arrays are not those of its
        config. The message then names the first array that differs, with both shapes.
    """

    def __init__(self, directory: str | Path, *, may_be_older: bool = False):
        self.directory = Path(os.path.abspath(directory))
        self.config: Config = load_config(directory)
        self.specs = spec_table(self.config)
        self.step = self._newest_step()
        folder, prefix = self.directory, ""
        if self.step is not None:
            folder, prefix = self.directory / RUN_CHECKPOINTS / str(self.step), "params/"
        self.arrays = self._open_arrays(folder / STATE, prefix)
        self._check_shapes(may_be_older)

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype.numpy_dtype if self.holds(path) else np.dtype(np.float32)

    def holds(self, path: str) -> bool:
        return path in self.arrays

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of the part of a parameter that one file holds."""
        return cast(tuple[int, ...], self.arrays[path].chunk_layout.write_chunk.shape)

    def read(self, path: str, index: Index) -> np.ndarray:
        if not self.holds(path):
            return initial_values(path, self.specs[path], self.config.train.seed, index)
        try:
            return self.arrays[path][index].read().result()
        except ValueError as error:  # TensorStore raises nothing else
            raise self._damaged(error) from error

    def _newest_step(self) -> int | None:
        folder = self.directory / RUN_CHECKPOINTS
        if not folder.is_dir():
            return None
        steps = [int(step.name) for step in folder.iterdir() if step.name.isdecimal()]
        if not steps:
            raise InputError(f"{self.directory} has no checkpoint yet: wait until the training run has saved one")
        return max(steps)

    def _open_arrays(self, state: Path, prefix: str) -> dict[str, ts.TensorStore]:
        """Returns the arrays of the tree in `state` whose paths begin with `prefix`, by the rest of the path."""
        context = uncached_context()
        if (state / "_METADATA").is_file():
            check_not_pointer(state / "_METADATA")
        try:
            entries = json.loads((state / "_METADATA").read_text())["tree_metadata"].values()
            names = ["/".join(key["key"] for key in entry["key_metadata"]) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error
        try:
            return {
                name.removeprefix(prefix): open_array(state, name, context)
                for name in sorted(set(names))
                if name.startswith(prefix)
            }
        except ValueError as error:
            raise self._damaged(error) from error

    def _check_shapes(self, may_be_older: bool) -> None:
        since_0_2 = {path for path in self.specs if path.startswith(_SINCE_0_2)}
        is_older = bool(since_0_2) and not since_0_2 & self.arrays.keys()
        if is_older and not may_be_older:
            raise InputError(
                f"{self.directory} was trained by jaxtml 0.1, whose models generate speech in another layout: train it "
                "further with `jaxtml train CONFIG --start-from` this directory, in a new --workdir"
            )
        for path in sorted((self.specs.keys() | self.arrays.keys()) - (since_0_2 if is_older else set())):
            found = self.arrays[path].shape if path in self.arrays else None
            wanted = self.specs[path].shape if path in self.specs else None
            if found != wanted:
                in_checkpoint, in_config = ("missing" if s is None else f"{s}" for s in (found, wanted))
                raise InputError(
                    f"checkpoint {self.directory} does not have the sizes of its {CONFIG}: "
                    f"{path} is {in_checkpoint} in the checkpoint, and {in_config} in the config; "
                    "copy both from the same checkpoint"
                )

    def _damaged(self, error: Exception) -> InputError:
        cause = " ".join(str(error).split())[:_LONGEST_CAUSE] or type(error).__name__
        remedy = "copy it again" if self.step is None else "the run may have removed this step, try again"
        return InputError(f"checkpoint {self.directory} is damaged or incomplete, {remedy}: {cause}")


def load_config(directory: str | Path) -> Config:
    """Reads the config of a jaxtml checkpoint or a training run.

    Raises:
      InputError: the directory is missing, or has no valid config.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}: name the directory of a checkpoint or a training run")
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory} is not a jaxtml checkpoint, because it has no {CONFIG}: name another directory")
    check_not_pointer(directory / CONFIG)
    try:
        config = from_json((directory / CONFIG).read_text())
        validate(config)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(
            f"{directory / CONFIG} is not the config of a jaxtml checkpoint: {error}; copy it again"
        ) from error
    return config


def load_checkpoint(
    directory: str | Path, dtype: str = "float32", *, may_be_older: bool = False
) -> tuple[Config, Params]:
    """Reads the config and all parameters of a jaxtml checkpoint, the parameters onto the first device as `dtype`.

    `checkpoint.opening.read_checkpoint` reads training runs and released checkpoints too. `OrbaxCheckpoint` says what
    `may_be_older` does.

    Raises:
      InputError: the directory is missing, is no jaxtml checkpoint or is a training run, or the checkpoint is damaged
        or does not have the sizes of its config.
    """
    if (Path(directory) / RUN_CHECKPOINTS).is_dir():
        raise InputError(
            f"{directory} is a training run: make a checkpoint of it with `jaxtml convert {directory} DST`"
        )
    source = OrbaxCheckpoint(directory, may_be_older=may_be_older)
    return source.config, read_parameters(source, dtype)
