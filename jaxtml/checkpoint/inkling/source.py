"""A released Inkling checkpoint as a parameter source: safetensors in bfloat16, NVFP4 or MXFP8.

Files are mapped, and only the parts that are asked for are read. The layout of every tensor is in its parameter's spec
(`Released` in `model.spec`). A release lacks the parameters of four parts: the embedding of the clock features
(`model.towers`), the embedding that marks the model's own speech, the flow head and the vocoder. These parameters get
the initial values of a new model. Called by `checkpoint.opening`, `convert` and `train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging

from jaxtml.checkpoint.inkling import quantised
from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.directory import MTP_PREFIX, model_name, read_json
from jaxtml.checkpoint.inkling.mapping import ReleasedTensor, released_tensors
from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, StoredTensor
from jaxtml.checkpoint.inkling.shards import stored_tensors
from jaxtml.checkpoint.source import Index, index_shape, spec_table
from jaxtml.checkpoint.transposed_copy import copy_contiguous
from jaxtml.config import Config
from jaxtml.errors import MOST_NAMED, InputError, join_names
from jaxtml.model.spec import initial_values

_FLOATS = ("BF16", "F32", "F16")  # dtypes of tensors that are not quantised


class ReleasedCheckpoint:
    """A `ParameterSource` of the released checkpoint in a directory.

    `transformers` writes checkpoints whose config has prediction heads and whose files have none. Then the heads are
    left out of the model, with a note in the log.

    Args:
      directory: the directory of the checkpoint.
      seed: the seed of the initial values of parameters that the release lacks.

    Attributes:
      stored: the place of each tensor in a file, by its released name.
      tensors: the name and layout of each tensor, by path and position.
      scales: the quantised tensors by name, with the tensors of their scales by suffix.

    Raises:
      InputError: the directory is missing or has no Inkling checkpoint; or tensors are unknown, missing, of another
        shape, or there twice. The message counts the tensors of each problem, and names five of them.
    """

    def __init__(self, directory: str | Path, seed: int = 0):
        self.directory, self.seed = Path(directory), seed
        try:
            released = read_json(self.directory / "config.json")
            config = config_from_inkling(released, model_name(self.directory.resolve()))
        except InputError as error:  # the error of a field does not know the directory
            text = str(error)
            raise InputError(f"{self.directory}/{text}" if text.startswith("config.json") else text) from error
        self.stored = stored_tensors(self.directory)
        self.config = self._without_missing_heads(config)
        self.specs = spec_table(self.config)
        self.tensors = {(tensor.path, tensor.position): tensor for tensor in released_tensors(self.config)}
        self.scales = self._check_tensors()
        self._dtypes = {path: np.dtype(np.float32) for path in self.specs}
        for tensor in self.tensors.values():
            self._dtypes[tensor.path] = self._tensor_dtype(tensor.name)

    def dtype(self, path: str) -> np.dtype:
        return self._dtypes[path]

    def holds(self, path: str) -> bool:
        return self.specs[path].released is not None

    def read(self, path: str, index: Index) -> np.ndarray:
        spec = self.specs[path]
        if not self.holds(path):
            return initial_values(path, spec, self.seed, index)
        if not spec.stacked:
            return copy_contiguous(self._read_tensor(self.tensors[path, ()], index))
        out = np.empty(index_shape(index, spec.shape), self.dtype(path))
        repeats, layers = (range(*cut.indices(size)) for cut, size in zip(index[:2], spec.shape[:2], strict=True))
        for i, repeat in enumerate(repeats):
            for j, layer in enumerate(layers):
                copy_contiguous(self._read_tensor(self.tensors[path, (repeat, layer)], index[2:]), out[i, j])
        return out

    def _read_tensor(self, tensor: ReleasedTensor, index: Index) -> np.ndarray:
        """Returns a part of one layer's parameter in our layout: a view of the file, unless the tensor is quantised."""
        stored, layout = self.stored[tensor.name], tensor.layout
        if tensor.name not in self.scales:
            return layout.load(stored.mapped())[index].astype(self.dtype(tensor.path), copy=False)
        # Dequantise all rows that have an element of the part, and then cut the part out of them.
        view = layout.view or layout.shape
        cuts = [range(size)[index[axis]] for axis, size in zip(layout.order, view, strict=True)]
        rows_per_index = layout.shape[1] // view[1]  # rows of the tensor for one index of the view's second axis
        rows = slice(cuts[1].start * rows_per_index, cuts[1].stop * rows_per_index)
        experts = slice(cuts[0].start, cuts[0].stop)
        values = quantised.dequantise(stored, self.scales[tensor.name], experts, rows)
        rest = (slice(None), slice(None), *(index[axis] for axis in layout.order[2:]))
        return values.reshape(len(cuts[0]), len(cuts[1]), *view[2:])[rest].transpose(layout.axes)

    def _without_missing_heads(self, config: Config) -> Config:
        if not config.backbone.mtp_heads or any(name.startswith(MTP_PREFIX) for name in self.stored):
            return config
        logging.info("%s has no %s* tensors: the model is read without prediction heads", self.directory, MTP_PREFIX)
        return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, mtp_heads=0, mtp_global=()))

    def _tensor_dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if name in self.scales else DTYPES[self.stored[name].dtype]

    def _check_tensors(self) -> dict[str, dict[str, StoredTensor]]:
        """Checks name, shape and dtype of every tensor. Returns the scales of the quantised tensors."""
        wanted = {tensor.name: tensor for tensor in self.tensors.values()}
        parts = {name: quantised.quantisation_parts(name, self.stored) for name in wanted if name in self.stored}
        parts = {name: tensors for name, tensors in parts.items() if tensors}
        part_names = {name + suffix for name, tensors in parts.items() for suffix in tensors}
        problems = {
            "missing": sorted(wanted.keys() - self.stored.keys()),
            "unknown": sorted(self.stored.keys() - wanted.keys() - part_names),
            "misfitting": self._misfits(wanted, parts),
        }
        for kind, names in problems.items():
            if len(names) > MOST_NAMED:
                logging.info("all %d %s tensors:\n%s", len(names), kind, "\n".join(names))
        found = [f"{len(names)} {kind} tensors: {join_names(names)}" for kind, names in problems.items() if names]
        if found:
            raise InputError(
                f"{self.directory} does not fit its config.json: {'; '.join(found)}; take both from the same release"
            )
        return {
            name: {suffix: tensor for suffix, tensor in tensors.items() if suffix not in quantised.UNUSED}
            for name, tensors in parts.items()
        }

    def _misfits(
        self, wanted: Mapping[str, ReleasedTensor], parts: Mapping[str, Mapping[str, StoredTensor]]
    ) -> list[str]:
        """Returns a phrase for each tensor whose shape or dtype is wrong.

        A dtype is also wrong if it is not the dtype of the parameter's other layers.
        """
        phrases = []
        dtypes: dict[str, str] = {}  # the dtype of the first layer, by path
        for name, tensor in wanted.items():
            if name not in self.stored:
                continue
            problem = _misfit(tensor, self.stored[name], parts.get(name))
            dtype = "BF16" if name in parts else self.stored[name].dtype
            if problem is None and dtypes.setdefault(tensor.path, dtype) != dtype:
                problem = f"{dtype}, other layers {dtypes[tensor.path]}"
            if problem:
                phrases.append(f"{name} is {problem}")
        return phrases


def _misfit(tensor: ReleasedTensor, stored: StoredTensor, parts: Mapping[str, StoredTensor] | None) -> str | None:
    """Returns what is wrong with the shape or dtype of a tensor: the end of a sentence that begins "the tensor is"."""
    shape = stored.shape
    if parts:
        if "expert" not in tensor.spec.axes:
            return "quantised, which jaxtml supports for routed experts alone"
        try:
            shape = quantised.logical_shape(stored, parts)
        except (ValueError, KeyError) as error:
            return f"in no quantised format that jaxtml knows ({error})"
    elif stored.dtype not in _FLOATS:
        return f"{stored.dtype}, not one of {', '.join(_FLOATS)}"
    return None if shape == tensor.layout.shape else f"{shape}, not {tensor.layout.shape}"
