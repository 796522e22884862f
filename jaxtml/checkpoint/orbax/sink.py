"""Our checkpoints in the making: written chunk by chunk, as Orbax restores them.

Written is what Orbax writes without OCDBT: one Zarr array per parameter, one file per chunk of it (Zarr 3 shards), so
that a chunk is there whole or not at all. A file holds a few experts or a strip of a matrix; within it, pieces of at
most 4 MiB can be read by themselves, for meshes that split what a file holds. Called by `convert.conversion`.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from absl import logging

from jaxtml.checkpoint.chunks import chunk_shape, layer_name
from jaxtml.checkpoint.files import CONFIG, RELEASE_FILES, STATE, TOKENIZER
from jaxtml.checkpoint.manifest import TensorRecord
from jaxtml.checkpoint.orbax.arrays import open_array, uncached_context
from jaxtml.checkpoint.source import Index, spec_table
from jaxtml.config import Config, to_json
from jaxtml.model.spec import Params, ParamSpec

PIECE_BYTES = 2**22  # bytes that can be read by themselves


def create_arrays(directory: Path, specs: Mapping[str, ParamSpec], dtypes: Mapping[str, np.dtype]) -> None:
    """A checkpoint of arrays that hold zeros, to be filled chunk by chunk. What Orbax itself writes for one number of
    each, and then arrays of the right size in their place."""
    from orbax.checkpoint import v1 as ocp  # half a second, which only saving and loading pay

    tree: Params = {}
    for path in specs:
        node = tree
        *folders, name = path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jnp.zeros((1,), dtypes[path])
    how = ocp.Context()
    saving = how.array.saving
    saving.use_ocdbt, saving.use_compression = False, False
    saving.array_metadata_store, saving.enable_write_sharding_file = None, False
    told = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of the OCDBT files that it was told not to write
    try:
        with how:
            ocp.save(str(directory), tree)
    finally:
        logging.set_verbosity(told)
    for path, spec in specs.items():
        shutil.rmtree(_folder(directory / STATE, path))
        _made(directory / STATE, path, spec, np.dtype(dtypes[path]))


class OrbaxSink:
    """A checkpoint of ours in the making, a `convert.streaming.ParameterSink`.

    Args:
      config: of the model.
      dtypes: what each parameter is written as.
      extra_files: files that come along, by their names in a release.
    """

    def __init__(self, config: Config, dtypes: Mapping[str, np.dtype], extra_files: Mapping[str, Path]):
        self.config, self.dtypes, self.extra_files = config, dtypes, extra_files
        self.specs = spec_table(config)
        self.arrays: dict[str, Any] = {}

    def dtype(self, path: str) -> np.dtype:
        return self.dtypes[path]

    def prepare(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            made = folder / "made"  # Orbax wants a directory that is not there
            create_arrays(made, self.specs, self.dtypes)
            for part in made.iterdir():
                part.rename(folder / part.name)
            made.rmdir()
            for name, file in self.extra_files.items():
                place = folder / (TOKENIZER if name == TOKENIZER else f"{RELEASE_FILES}/{name}")
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
            (folder / CONFIG).write_text(to_json(self.config))
        context = uncached_context()
        self.arrays = {path: open_array(folder / STATE, path, context) for path in self.specs}

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        """Returns when the chunk is in its file."""
        try:
            self.arrays[path][index].write(values).result()
        except ValueError as error:  # all that TensorStore raises
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        return values

    def manifest_record(self, path: str, at: tuple[int, ...], crc32: int) -> tuple[str, TensorRecord]:
        spec = self.specs[path]
        return layer_name(path, at), TensorRecord.of(self.dtypes[path].name, spec.shape[spec.stacked :], crc32)


def _folder(state: Path, path: str) -> Path:
    return state / path.replace("/", ".")


def _made(state: Path, path: str, spec: ParamSpec, dtype: np.dtype) -> None:
    chunk = chunk_shape(spec, dtype.itemsize)
    piece = list(chunk)
    while math.prod(piece) * dtype.itemsize > PIECE_BYTES:
        axis = int(np.argmax([size if size % 2 == 0 else 0 for size in piece]))
        if piece[axis] % 2:
            break
        piece[axis] //= 2
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codec = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": piece, "codecs": [little], "index_codecs": [little, {"name": "crc32c"}]},
    }
    metadata = {
        "shape": spec.shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [codec],
    }
    store = {"driver": "file", "path": f"{_folder(state, path)}/"}
    ts.open({"driver": "zarr3", "kvstore": store, "metadata": metadata, "create": True}).result()
