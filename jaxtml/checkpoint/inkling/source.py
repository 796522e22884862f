"""A released Inkling checkpoint as a `Source`: bfloat16, NVFP4 or MXFP8 safetensors, read where they lie.

Every spec's `Released` says where a parameter stands and how its axes lie, `Stack.layer_index` unrolls stacks of
layers. What the released model lacks (clock, own voice, flow head, vocoder) is what `init_params` draws from the seed.
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
from jaxtml.checkpoint.inkling.directory import _MTP, model_name, read_json, stored_tensors
from jaxtml.checkpoint.inkling.mapping import ReleasedTensor, released_tensors
from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, StoredTensor
from jaxtml.checkpoint.source import Index, index_shape
from jaxtml.checkpoint.transposed_copy import copy_contiguous
from jaxtml.errors import MOST_NAMED, InputError, join_names
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import flatten, initial_values

_NUMBERS = ("BF16", "F32", "F16")


class ReleasedCheckpoint:
    """The checkpoint in a directory. Prediction heads that its config has and its files lack are left out, with a note
    in the log: `transformers` writes such checkpoints.

    Raises:
      InputError: no such directory, not an Inkling checkpoint, or tensors that are unknown, missing, misshapen or there
        twice: all of a kind are counted, five named.
    """

    def __init__(self, directory: str | Path, seed: int = 0):
        self.directory, self.seed = Path(directory), seed
        config = config_from_inkling(read_json(self.directory / "config.json"), model_name(self.directory.resolve()))
        self.tensors = stored_tensors(self.directory)
        if config.backbone.mtp_heads and not any(name.startswith(_MTP) for name in self.tensors):
            logging.info("%s has no %s* tensors: its prediction heads are left out", directory, _MTP)
            bare = dataclasses.replace(config.backbone, mtp_heads=0, mtp_global=())
            config = dataclasses.replace(config, backbone=bare)
        self.config = config
        self.table = dict(flatten(InteractionModel(config).specs()))
        self.places = {(place.path, place.index): place for place in released_tensors(config)}
        self.parts = self._checked()
        self._dtypes = {path: np.dtype(np.float32) for path in self.table}
        for place in self.places.values():
            self._dtypes[place.path] = self._stored_dtype(place.name)

    def dtype(self, path: str) -> np.dtype:
        return self._dtypes[path]

    def holds(self, path: str) -> bool:
        return self.table[path].released is not None

    def read(self, path: str, index: Index) -> np.ndarray:
        spec = self.table[path]
        if not self.holds(path):
            return initial_values(path, spec, self.seed, index)
        if not spec.stacked:
            return copy_contiguous(self.part(self.places[path, ()], index))
        out = np.empty(index_shape(index, spec.shape), self.dtype(path))
        stacked = [range(*cut.indices(size)) for cut, size in zip(index[:2], spec.shape[:2], strict=True)]
        for i, repeat in enumerate(stacked[0]):
            for j, layer in enumerate(stacked[1]):
                copy_contiguous(self.part(self.places[path, (repeat, layer)], index[2:]), out[i, j])
        return out

    def part(self, place: ReleasedTensor, index: Index) -> np.ndarray:
        """A part of one layer's parameter, as a view of the file where it is not quantised."""
        stored, released = self.tensors[place.name], place.spec.released
        assert released is not None
        if place.name not in self.parts:
            return released.load(stored.mapped())[index].astype(self.dtype(place.path), copy=False)
        view = released.view or released.shape
        cuts = [range(size)[index[axis]] for axis, size in zip(released.order, view, strict=True)]
        joined = released.shape[1] // view[1]  # rows of the file to one of the view
        rows = slice(cuts[1].start * joined, cuts[1].stop * joined)
        tensor = quantised.dequantise(stored, self.parts[place.name], slice(cuts[0].start, cuts[0].stop), rows)
        rest = (slice(None), slice(None), *(index[axis] for axis in released.order[2:]))
        return tensor.reshape(len(cuts[0]), len(cuts[1]), *view[2:])[rest].transpose(released.axes)

    def _stored_dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if name in self.parts else DTYPES[self.tensors[name].dtype]

    def _checked(self) -> dict[str, dict[str, StoredTensor]]:
        """The parts of quantised tensors by name, after a look at every tensor's name, shape and dtype."""
        wanted = {place.name: place for place in self.places.values()}
        parts = {name: quantised.quantisation_parts(name, self.tensors) for name in wanted if name in self.tensors}
        parts = {name: found for name, found in parts.items() if found}
        beside = {name + suffix for name, found in parts.items() for suffix in found}
        unknown = sorted(self.tensors.keys() - wanted.keys() - beside)
        missing = sorted(wanted.keys() - self.tensors.keys())
        misshapen = []
        dtypes: dict[str, str] = {}
        for name, place in wanted.items():
            if name in self.tensors:
                wrong = _misfit(place, self.tensors[name], parts.get(name))
                dtype = "BF16" if name in parts else self.tensors[name].dtype
                if wrong is None and dtypes.setdefault(place.path, dtype) != dtype:
                    wrong = f"{dtype}, other layers {dtypes[place.path]}"
                misshapen += [f"{name} is {wrong}"] if wrong else []
        found = (("missing", missing), ("unknown", unknown), ("misfitting", misshapen))
        said = [f"{len(names)} {kind} tensors: {join_names(names)}" for kind, names in found if names]
        for kind, names in found:
            if len(names) > MOST_NAMED:
                logging.info("all %d %s tensors:\n%s", len(names), kind, "\n".join(names))
        if said:
            raise InputError(f"{self.directory} does not fit its config.json: {'; '.join(said)}")
        return {name: {k: v for k, v in found.items() if k not in quantised.UNUSED} for name, found in parts.items()}


def _misfit(place: ReleasedTensor, stored: StoredTensor, parts: Mapping[str, StoredTensor] | None) -> str | None:
    """What is wrong with a tensor's shape or dtype."""
    released = place.spec.released
    assert released is not None
    shape = stored.shape
    if parts:
        if "expert" not in place.spec.axes:
            return "quantised, and no routed expert"
        try:
            shape = quantised.logical_shape(stored, parts)
        except (ValueError, KeyError) as error:
            return f"of no format that is known ({error})"
    elif stored.dtype not in _NUMBERS:
        return f"{stored.dtype}, not one of {', '.join(_NUMBERS)}"
    return None if shape == released.shape else f"{shape}, not {released.shape}"
