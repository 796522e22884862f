"""Our parameters as a released Inkling checkpoint in the making: shards of safetensors that `transformers` reads.

What Inkling lacks (clock, own voice, flow head, vocoder) is left out: keep our own checkpoint for it. Called by
`convert.conversion`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from jaxtml.checkpoint.inkling.config import inkling_config
from jaxtml.checkpoint.inkling.directory import INDEX, WEIGHTS, read_json
from jaxtml.checkpoint.inkling.mapping import ReleasedTensor, released_tensors
from jaxtml.checkpoint.inkling.safetensors_file import StoredTensor, create_file, write_at
from jaxtml.checkpoint.manifest import TensorRecord
from jaxtml.checkpoint.source import Index, spec_table
from jaxtml.checkpoint.transposed_copy import copy_contiguous
from jaxtml.config import Config
from jaxtml.model.spec import ParamSpec

SHARD_BYTES = 5 * 10**9
EXACT = (".gate.bias", ".gate.global_scale")  # float32 in every release


class ReleasedSink:
    """A `convert.streaming.ParameterSink`.

    Args:
      config: of the model.
      dtypes: what each parameter is written as.
      extra_files: files that come along, by name. A `config.json` among them is a release's own: what it says that is
        not of the model's shape is said again.

    Raises:
      InputError: a config that Inkling cannot describe.
    """

    def __init__(self, config: Config, dtypes: Mapping[str, np.dtype], extra_files: Mapping[str, Path]):
        self.specs = {path: spec for path, spec in spec_table(config).items() if spec.released is not None}
        said = read_json(extra_files["config.json"]) if "config.json" in extra_files else {}
        b = config.backbone
        if b.global_.pinned:
            logging.warning(
                "Inkling has no word for pinned tokens: beyond %d tokens its global layers see what ours do not",
                b.global_.window,
            )
        self.described = inkling_config(config, said) | {"dtype": _commonest(self.specs, dtypes).name}
        self.dtypes, self.extra_files = dtypes, extra_files
        self.places = {(place.path, place.index): place for place in released_tensors(config)}
        self.stored: dict[str, StoredTensor] = {}

    def dtype(self, path: str) -> np.dtype:
        return self.dtypes[path]

    def prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        shards = self._shards()
        names = [WEIGHTS]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {place.name: name for name, shard in zip(names, shards, strict=True) for place in shard}
            size = sum(self._nbytes(place) for place in self.places.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        for name, shard in zip(names, shards, strict=True):
            tensors = ((place.name, _shape(place), self.dtypes[place.path]) for place in shard)
            self.stored |= create_file(folder / name, tensors)
        for name, file in self.extra_files.items():
            shutil.copyfile(file, folder / name)
        (folder / "config.json").write_text(json.dumps(self.described, indent=2) + "\n")

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        spec = self.specs[path]
        released = spec.released
        assert released is not None
        stored = self.stored[self.places[path, tuple(cut.start for cut in index[: spec.stacked])].name]
        ours = values.reshape(values.shape[spec.stacked :])
        view = released.view or released.shape
        begins = np.ravel_multi_index([index[spec.stacked + axis].start for axis in released.order], view)
        turned = copy_contiguous(ours.transpose(released.order))
        write_at(stored, int(begins) * values.itemsize, turned)
        return turned

    def manifest_record(self, path: str, at: tuple[int, ...], crc32: int) -> tuple[str, TensorRecord]:
        name = self.places[path, at].name
        return name, TensorRecord.of(self.stored[name].dtype, self.stored[name].shape, crc32)

    def _shards(self) -> list[list[ReleasedTensor]]:
        shards: list[list[ReleasedTensor]] = [[]]
        size = 0
        for place in self.places.values():
            step = self._nbytes(place)
            if shards[-1] and size + step > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(place)
            size += step
        return shards

    def _nbytes(self, place: ReleasedTensor) -> int:
        return math.prod(_shape(place)) * self.dtypes[place.path].itemsize


def released_dtypes(config: Config, dtype: str) -> dict[str, np.dtype]:
    """`dtype` for all, but float32 for what is float32 in every release."""
    found: dict[str, np.dtype] = {}
    for place in released_tensors(config):
        found[place.path] = np.dtype(np.float32) if place.name.endswith(EXACT) else np.dtype(dtype)
    return found


def _shape(place: ReleasedTensor) -> tuple[int, ...]:
    assert place.spec.released is not None
    return place.spec.released.shape


def _commonest(specs: Mapping[str, ParamSpec], dtypes: Mapping[str, np.dtype]) -> np.dtype:
    """That of most numbers."""
    sizes: dict[np.dtype, int] = {}
    for path, spec in specs.items():
        sizes[dtypes[path]] = sizes.get(dtypes[path], 0) + math.prod(spec.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])
