"""The arrays of a checkpoint of ours, opened through TensorStore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorstore as ts


def open_array(state: Path, path: str, context: ts.Context) -> Any:
    """The array of a parameter, to be read or written in part. Raises `ValueError` where it is not there."""
    name = path.replace("/", ".")
    store: dict[str, Any] = {"driver": "file", "path": f"{state / name}/"}
    if (state / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}, "path": f"{name}/"}
    # A chunk that is not there is a damaged one, to Orbax too, though all zeros need no file.
    whole = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
    how = {"driver": "zarr3", "kvstore": store, **whole}
    return ts.open(how, context=context).result()


def uncached_context() -> ts.Context:
    """For arrays whose every chunk is read or written once: files are mapped to be read, which saves a copy, and synced
    by who wants them to be."""
    mapped = {"file_io_mode": {"mode": "memmap"}, "file_io_sync": False}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, **mapped})
