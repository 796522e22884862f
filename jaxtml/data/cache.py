"""Encoded rows on disk, for an accelerator that trains faster than the host's CPUs can mix conversations.

`build` writes the first N rows of a dataset as shards, in worker processes. A build can be killed and started again.
`CachedRows` is the dataset that reads the shards. Its rows equal those of the original dataset, and each epoch visits
them in a new order. A cache stores the digest of its original dataset; a run with another dataset refuses the cache.
Called by `jaxtml data --rows N` and `jaxtml.train.loop`.

    cache.json                    digest of the original dataset, and number of rows
    00012-of-00040.array_record   one record per row: the arrays of an encoded conversation, without padding
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypedDict

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from jaxtml.config import Config
from jaxtml.data.dataset import ConversationDataset, CountsPatches, Dataset
from jaxtml.data.rows import Row, pad
from jaxtml.errors import InputError
from jaxtml.stream.layout import EncodedConversation
from jaxtml.strict_json import dumps

CACHE_FOLDER = "cache"
"""The row cache inside the folder that `jaxtml data` writes."""

SHARD_ROWS = 64
"""Rows of a shard: about six seconds of work for one core."""

_FIELDS = dataclasses.fields(EncodedConversation)
_STORED_NAMES = {"micro_turn": "turn"}
"""Names of arrays in a record, where they differ from the field's name. Existing caches have these names."""


class CacheHead(TypedDict):
    """The content of `cache.json`: the digest of the dataset that was cached, and how many of its rows."""

    digest: str
    rows: int


def check_count(folder: Path, count: int) -> None:
    """Checks, before the long work, that `folder` can become a cache of `count` rows.

    Raises:
      InputError: `count` is no positive multiple of `SHARD_ROWS`, or `folder` holds a cache of another size.
    """
    if count < 1 or count % SHARD_ROWS:
        raise InputError(f"a cache of {count} rows: give a positive multiple of {SHARD_ROWS}")
    if (folder / "cache.json").exists():
        held = _read_head(folder)["rows"]
        if held != count:
            raise InputError(f"{folder} holds a cache of {held} rows, not {count}: remove it, or name a new folder")


def build(dataset: ConversationDataset, folder: Path, count: int, workers: int) -> None:
    """Writes those of the rows `[0, count)` that `folder` does not have yet.

    Args:
      dataset: makes the rows; pickled for the worker processes.
      folder: the cache, created if it is not there.
      count: rows of the cache, a multiple of `SHARD_ROWS`.
      workers: processes.

    Raises:
      InputError: `count` is no positive multiple of `SHARD_ROWS`, or `folder` holds a cache of other rows.
    """
    check_count(folder, count)
    folder.mkdir(parents=True, exist_ok=True)
    head: CacheHead = {"digest": dataset.digest, "rows": count}
    if (folder / "cache.json").exists():
        if _read_head(folder) != head:
            raise InputError(
                f"{folder} holds rows of another bank, config or tokenizer: remove it, or name a new folder"
            )
    else:
        _write_atomically(folder / "cache.json", dumps(head).encode())
    shards = count // SHARD_ROWS
    missing = [shard for shard in range(shards) if not _shard_path(folder, shard, shards).exists()]
    context = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(workers, mp_context=context) as pool:
        task = progress.add_task("rows", total=shards, completed=shards - len(missing))
        running = [pool.submit(_build_shard, dataset, folder, shard, shards) for shard in missing]
        try:
            for finished in as_completed(running):
                finished.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build_shard(dataset: ConversationDataset, folder: Path, shard: int, shards: int) -> None:
    path = _shard_path(folder, shard, shards)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    writer = ArrayRecordWriter(str(partial), "group_size:1")  # one row can be read without its neighbours
    for index in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS):
        writer.write(_to_bytes(dataset.encoded(index)))
    writer.close()
    partial.replace(path)


def _to_bytes(encoded: EncodedConversation) -> bytes:
    arrays = {_STORED_NAMES.get(field.name, field.name): getattr(encoded, field.name) for field in _FIELDS}
    arrays["speech"] = arrays["speech"].astype(np.float16)  # the dtype of a row, see `rows.row_shapes`
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _from_bytes(record: bytes) -> EncodedConversation:
    with np.load(io.BytesIO(record)) as arrays:
        return EncodedConversation(
            **{field.name: arrays[_STORED_NAMES.get(field.name, field.name)] for field in _FIELDS}
        )


def _shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"{shard:05}-of-{shards:05}.array_record"


def _write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under another name and renames it: a reader finds all of the file or none of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _read_head(folder: Path) -> CacheHead:
    try:
        head = json.loads((folder / "cache.json").read_bytes())
        return {"digest": str(head["digest"]), "rows": int(head["rows"])}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no cache of rows: build one with `jaxtml data --rows N`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'cache.json'} is damaged: remove the folder and build the cache anew") from error


@dataclass(frozen=True)
class CachedRows:
    """The rows of a finished cache, as a dataset (`jaxtml.data.dataset.Dataset`).

    Every epoch visits each row once, in an order of its own.

    Attributes:
      config: `config.data.seed` decides the order of the rows in each epoch.
      folder: the cache.
      count: rows in the cache.
      original_digest: digest of the dataset that was cached.
      max_patches: patches of the fullest row; None for as many as the config allows.
    """

    config: Config
    folder: Path
    count: int
    original_digest: str
    max_patches: int | None = None

    @staticmethod
    def open(config: Config, folder: Path, original: Dataset | None = None) -> CachedRows:
        """Opens a cache.

        Args:
          config: the resolved config.
          folder: the cache.
          original: the dataset whose rows the cache must have; None accepts a cache of any dataset.

        Raises:
          InputError: there is no finished cache in `folder`, or it has other rows than `original`.
        """
        head = _read_head(folder)
        shards = head["rows"] // SHARD_ROWS
        missing = sum(not _shard_path(folder, shard, shards).exists() for shard in range(shards))
        if missing:
            raise InputError(
                f"{folder} lacks {missing} of {shards} shards: finish it with `jaxtml data --rows {head['rows']}`"
            )
        if original is not None and head["digest"] != original.digest:
            raise InputError(
                f"{folder} holds rows of another bank, config or tokenizer: remove it; to have new rows, run "
                f"`jaxtml data --rows {head['rows']}`"
            )
        patches = original.max_patches if isinstance(original, CountsPatches) else None
        return CachedRows(config, folder, head["rows"], head["digest"], patches)

    @property
    def digest(self) -> str:
        """The digest of the original dataset, and the number of rows.

        It differs from the original digest because a cache gives the same rows in another order.
        """
        return f"{self.original_digest} cache of {self.count}"

    def row(self, index: int) -> Row:
        """Returns the arrays of row `index` of an endless series of epochs."""
        epoch, within = divmod(index, self.count)
        stored = _epoch_order(self.config.data.seed, epoch, self.count)[within]
        return pad(_from_bytes(self._records[int(stored)]), self.config, self.max_patches)

    @cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        shards = self.count // SHARD_ROWS
        return grain.sources.ArrayRecordDataSource([str(_shard_path(self.folder, n, shards)) for n in range(shards)])

    def __getstate__(self) -> dict[str, object]:
        """Leaves the open files out: each worker process opens its own."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns `[count]` int64: for each place in the epoch, the number of the stored row that it visits."""
    return np.random.default_rng((seed, epoch)).permutation(count)
