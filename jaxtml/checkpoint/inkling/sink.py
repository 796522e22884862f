"""A released Inkling checkpoint that is written chunk by chunk: safetensors that `transformers` reads.

Inkling has no place for four of our parts: the embedding of the clock features (`model.towers`), the embedding that
marks the model's own speech, the flow head and the vocoder. A release is written without their parameters, so keep the
jaxtml checkpoint too. Called by `convert.conversion`.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from jaxtml.checkpoint.inkling.config import inkling_config
from jaxtml.checkpoint.inkling.directory import INDEX, WEIGHTS, read_json
from jaxtml.checkpoint.inkling.layout import ReleaseLayout
from jaxtml.checkpoint.inkling.mapping import ReleasedTensor, released_tensors
from jaxtml.checkpoint.inkling.safetensors_file import (
    StoredTensor,
    create_file,
    dtype_name,
    header_text,
    write_at,
)
from jaxtml.checkpoint.manifest import TensorRecord
from jaxtml.checkpoint.source import Index, Position, spec_table
from jaxtml.checkpoint.transposed_copy import copy_contiguous
from jaxtml.config import Config
from jaxtml.model.spec import ParamSpec
from jaxtml.strict_json import dumps

SHARD_BYTES = 5 * 10**9  # the largest size of a file; a tensor that is larger has a file of its own
_FLOAT32 = (".gate.bias", ".gate.global_scale")  # endings of the tensors that are float32 in every release


class ReleasedSink:
    """A `ParameterSink` that makes a released checkpoint.

    Args:
      config: the config of the model.
      dtypes: the dtype in which each parameter is written.
      extra_files: files to copy into the checkpoint, by name. A `config.json` among them comes from the original
        release. Its fields are copied to the new `config.json`, except for those that follow from the sizes of the
        model.
      layout: the layout of the release from which the parameters come. If it has the same tensors, the files get the
        same headers and the same index. Otherwise they get those that the `safetensors` library writes.

    Raises:
      InputError: Inkling's config cannot express the model.
    """

    def __init__(
        self,
        config: Config,
        dtypes: Mapping[str, np.dtype],
        extra_files: Mapping[str, Path],
        layout: ReleaseLayout | None = None,
    ):
        self.specs = {path: spec for path, spec in spec_table(config).items() if spec.released is not None}
        original = read_json(extra_files["config.json"]) if "config.json" in extra_files else {}
        window = config.backbone.global_.window
        if config.backbone.global_.pinned or config.backbone.global_.retained:
            logging.warning(
                "Inkling has no pinned or retained tokens: beyond %d tokens its global layers attend to other tokens "
                "than ours",
                window,
            )
        self.inkling_config = inkling_config(config, original) | {"dtype": _main_dtype(self.specs, dtypes).name}
        self.dtypes, self.extra_files = dtypes, extra_files
        self.tensors = {(tensor.path, tensor.position): tensor for tensor in released_tensors(config)}
        self.stored: dict[str, StoredTensor] = {}
        self.layout = layout if layout is not None and self._fits(layout) else self._library_layout()

    @property
    def layout_id(self) -> str:
        return hashlib.sha256(self.layout.to_json().encode()).hexdigest()[:16]

    def dtype(self, path: str) -> np.dtype:
        return self.dtypes[path]

    def prepare(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        if self.layout.index is not None:
            (folder / INDEX).write_text(self.layout.index)
        for file, header in self.layout.headers.items():
            self.stored |= create_file(folder / file, header)
        for name, file in self.extra_files.items():
            shutil.copyfile(file, folder / name)
        (folder / "config.json").write_text(dumps(self.inkling_config, indent=2) + "\n")

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        spec = self.specs[path]
        tensor = self.tensors[path, tuple(cut.start for cut in index[: spec.stacked])]
        layout = tensor.layout
        layer_index = index[spec.stacked :]
        released = copy_contiguous(values.reshape(values.shape[spec.stacked :]).transpose(layout.order))
        # A chunk's bytes lie together in the released tensor: the place of its first element is enough.
        first = np.ravel_multi_index([layer_index[axis].start for axis in layout.order], layout.view or layout.shape)
        write_at(self.stored[tensor.name], int(first) * values.itemsize, released)
        return released

    def manifest_record(self, path: str, position: Position, crc32: int) -> tuple[str, TensorRecord]:
        name = self.tensors[path, position].name
        return name, TensorRecord.create(self.stored[name].dtype, self.stored[name].shape, crc32)

    def _fits(self, layout: ReleaseLayout) -> bool:
        """Returns whether a layout has exactly the tensors that are written, with their dtypes and shapes."""
        wanted = {
            tensor.name: (dtype_name(self.dtypes[tensor.path]), tensor.layout.shape) for tensor in self.tensors.values()
        }
        return layout.tensors() == wanted

    def _library_layout(self) -> ReleaseLayout:
        """Returns the layout that the `safetensors` library and `transformers` would write for our shards."""
        shards = self._shards()
        headers = {
            file: header_text((tensor.name, tensor.layout.shape, self.dtypes[tensor.path]) for tensor in shard)
            for file, shard in shards.items()
        }
        if len(shards) == 1:
            return ReleaseLayout(headers, None)
        weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        total = sum(self._nbytes(tensor) for tensor in self.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return ReleaseLayout(headers, dumps(index, indent=2, sort_keys=True) + "\n")

    def _shards(self) -> dict[str, list[ReleasedTensor]]:
        """Returns the tensors of each file by the file's name."""
        shards: list[list[ReleasedTensor]] = [[]]
        size = 0
        for tensor in self.tensors.values():
            nbytes = self._nbytes(tensor)
            if shards[-1] and size + nbytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += nbytes
        if len(shards) == 1:
            return {WEIGHTS: shards[0]}
        return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}

    def _nbytes(self, tensor: ReleasedTensor) -> int:
        return math.prod(tensor.layout.shape) * self.dtypes[tensor.path].itemsize


def released_dtypes(config: Config, dtype: str) -> dict[str, np.dtype]:
    """Returns the dtype of each parameter that a release has: `dtype`, except where a release always has float32."""
    return {
        tensor.path: np.dtype(np.float32) if tensor.name.endswith(_FLOAT32) else np.dtype(dtype)
        for tensor in released_tensors(config)
    }


def _main_dtype(specs: Mapping[str, ParamSpec], dtypes: Mapping[str, np.dtype]) -> np.dtype:
    """Returns the dtype that most elements of the parameters have."""
    sizes: dict[np.dtype, int] = {}
    for path, spec in specs.items():
        sizes[dtypes[path]] = sizes.get(dtypes[path], 0) + math.prod(spec.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])
