"""A jaxtml checkpoint that is written chunk by chunk, and that Orbax can restore. Called by `convert.conversion`.

The result is what Orbax writes without OCDBT: one Zarr array for each parameter, and one file for each chunk of the
array (a Zarr 3 shard). So a chunk is either complete or missing. A file holds a few experts or a strip of a matrix.
Within a file, pieces of at most 4 MiB can be read by themselves, for meshes that split the content of a file.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from absl import logging

from jaxtml.checkpoint.chunks import chunk_shape, layer_name
from jaxtml.checkpoint.files import CONFIG, RELEASE_FILES, STATE, TOKENIZER
from jaxtml.checkpoint.inkling.layout import LAYOUT, ReleaseLayout
from jaxtml.checkpoint.manifest import TensorRecord
from jaxtml.checkpoint.orbax.arrays import array_folder, open_array, uncached_context
from jaxtml.checkpoint.source import Index, Position, spec_table
from jaxtml.config import Config, to_json
from jaxtml.model.spec import Params, ParamSpec

PIECE_BYTES = 2**22  # the largest part of a file that can be read by itself


class OrbaxSink:
    """A `ParameterSink` that makes a jaxtml checkpoint.

    Args:
      config: the config of the model.
      dtypes: the dtype in which each parameter is written.
      extra_files: files to copy into the checkpoint, by their names in a release.
      layout: the layout of the release from which the parameters come, kept for a conversion back; None: there is none.
    """

    layout_id = ""  # the chunks of a parameter follow from its shape and dtype alone

    def __init__(
        self,
        config: Config,
        dtypes: Mapping[str, np.dtype],
        extra_files: Mapping[str, Path],
        layout: ReleaseLayout | None = None,
    ):
        self.config, self.dtypes, self.extra_files, self.layout = config, dtypes, extra_files, layout
        self.specs = spec_table(config)
        self.arrays: dict[str, ts.TensorStore] = {}

    def dtype(self, path: str) -> np.dtype:
        return self.dtypes[path]

    def prepare(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            self._make_checkpoint(folder)
        context = uncached_context()
        self.arrays = {path: open_array(folder / STATE, path, context) for path in self.specs}

    def _make_checkpoint(self, folder: Path) -> None:
        """Makes arrays of zeros and all other files. The config comes last: it tells `prepare` that all is made."""
        made = folder / "made"  # Orbax wants a directory that does not exist
        create_arrays(made, self.specs, self.dtypes)
        for part in made.iterdir():
            part.rename(folder / part.name)
        made.rmdir()
        for name, file in self.extra_files.items():
            target = folder / (TOKENIZER if name == TOKENIZER else f"{RELEASE_FILES}/{name}")
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        if self.layout is not None:
            (folder / RELEASE_FILES).mkdir(exist_ok=True)
            (folder / RELEASE_FILES / LAYOUT).write_text(self.layout.to_json())
        (folder / CONFIG).write_text(to_json(self.config))

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        """As `ParameterSink.write`. Returns when the chunk is in its file.

        Raises:
          OSError: the disk is full (`errno.ENOSPC`).
        """
        try:
            self.arrays[path][index].write(values).result()
        except ValueError as error:  # TensorStore raises nothing else
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        return values

    def manifest_record(self, path: str, position: Position, crc32: int) -> tuple[str, TensorRecord]:
        spec = self.specs[path]
        record = TensorRecord.create(self.dtypes[path].name, spec.shape[spec.stacked :], crc32)
        return layer_name(path, position), record


def create_arrays(directory: Path, specs: Mapping[str, ParamSpec], dtypes: Mapping[str, np.dtype]) -> None:
    """Makes a checkpoint whose arrays hold zeros, to be filled chunk by chunk.

    Orbax writes a checkpoint of one number for each parameter. Then arrays of the right sizes take their places.
    """
    from orbax.checkpoint import v1 as ocp  # takes half a second, so only callers that save pay for the import

    tree: Params = {}
    for path in specs:
        node = tree
        *folders, name = path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jnp.zeros((1,), dtypes[path])
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_compression = False, False
    saving.array_metadata_store, saving.enable_write_sharding_file = None, False
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax would warn that OCDBT is off
    try:
        with context:
            ocp.save(str(directory), tree)
    finally:
        logging.set_verbosity(verbosity)
    for path, spec in specs.items():
        shutil.rmtree(array_folder(directory / STATE, path))
        _create_array(directory / STATE, path, spec, np.dtype(dtypes[path]))


def _create_array(state: Path, path: str, spec: ParamSpec, dtype: np.dtype) -> None:
    """Makes a Zarr array of zeros. A chunk is a file, and is cut into pieces of at most `PIECE_BYTES`."""
    chunk = chunk_shape(spec, dtype.itemsize)
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": _piece_shape(chunk, dtype.itemsize),
            "codecs": [little_endian],
            "index_codecs": [little_endian, {"name": "crc32c"}],
        },
    }
    metadata = {
        "shape": spec.shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [sharding],
    }
    store = {"driver": "file", "path": f"{array_folder(state, path)}/"}
    ts.open({"driver": "zarr3", "kvstore": store, "metadata": metadata, "create": True}).result()


def _piece_shape(chunk: tuple[int, ...], itemsize: int) -> list[int]:
    """Returns the shape of a piece: the chunk with its longest even axis halved, until a piece is small enough."""
    piece = list(chunk)
    while math.prod(piece) * itemsize > PIECE_BYTES:
        axis = int(np.argmax([size if size % 2 == 0 else 0 for size in piece]))
        if piece[axis] % 2:
            break
        piece[axis] //= 2
    return piece
