"""The arrays of a jaxtml checkpoint, opened through TensorStore instead of Orbax.

TensorStore reads and writes any part of an array, and it opens arrays in milliseconds. Called by the source and the
sink beside this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorstore as ts


def array_folder(state: Path, path: str) -> Path:
    """Returns the folder of a parameter's array in a checkpoint that was written without OCDBT."""
    return state / path.replace("/", ".")


def open_array(state: Path, path: str, context: ts.Context) -> ts.TensorStore:
    """Opens the array of a parameter in the folder `state` of a checkpoint.

    Raises:
      ValueError: the array is missing or damaged.
    """
    folder = array_folder(state, path)
    store: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
    if (state / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}, "path": f"{folder.name}/"}
    # By default, TensorStore takes a missing chunk for zeros. Here a missing chunk is damage, as it is for Orbax.
    chunks = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
    return ts.open({"driver": "zarr3", "kvstore": store, **chunks}, context=context).result()


def uncached_context() -> ts.Context:
    """Returns a TensorStore context for arrays whose every chunk is read or written once.

    Nothing is cached. Files are mapped into memory to be read, which saves a copy. Written files are not synced: a
    caller who needs the data on the disk calls `os.sync`.
    """
    file_io = {"file_io_mode": {"mode": "memmap"}, "file_io_sync": False}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, **file_io})
