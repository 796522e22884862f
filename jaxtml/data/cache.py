"""Encoded rows on disk, for a trainer that eats faster than they can be mixed (an accelerator beside few cores).

`build` writes the first N rows of a `Rows` in shards, by worker processes; kill it and start it again at will. What is
cached depends on bank, config and tokenizer alone, and a cache made from others is refused. `CachedRows` gives row
`i` as `Rows` would, from a new order of the N in each epoch. Called by `jaxtml data --rows N` and `jaxtml.train`.

    cache.json                    the digest of what the rows are made from, and how many there are
    00012-of-00040.array_record   one record per row: the arrays of an encoded sequence, without padding
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from jaxtml.config import Config
from jaxtml.data.pipeline import Batch, Rows, pad
from jaxtml.errors import InputError
from jaxtml.stream.layout import Sequence

SHARD_ROWS = 64  # about six seconds of work for one core
FORMAT = 1


def digest(rows: Rows) -> str:
    """Returns the sha256 of everything that decides what row `i` is.

    `data.dataset` is left out. The name of a dataset changes no row, and existing caches have a digest without it.
    """
    data = dataclasses.asdict(rows.config.data)
    del data["dataset"]
    made_from = [
        FORMAT,
        rows.speakers.bank.digest,
        data,
        dataclasses.asdict(rows.config.duplex),
        dataclasses.asdict(rows.weights),
        [rows.codec.encode(text) for text in sorted(rows.speakers.replies)],
        hashlib.sha256(rows.speakers.users.tobytes()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def build(rows: Rows, folder: Path, count: int, workers: int) -> None:
    """Write the rows `[0, count)` that are not there yet. `count` is a multiple of 64."""
    if count < 1 or count % SHARD_ROWS:
        raise InputError(f"a cache of {count} rows: give a positive multiple of {SHARD_ROWS}")
    folder.mkdir(parents=True, exist_ok=True)
    head = {"digest": digest(rows), "rows": count}
    if (folder / "cache.json").exists():
        if _read_head(folder) != head:
            raise InputError(f"{folder} holds a cache of other rows: name a new folder, or remove this one")
    else:
        _write(folder / "cache.json", json.dumps(head).encode())
    shards = count // SHARD_ROWS
    todo = [shard for shard in range(shards) if not _shard_path(folder, shard, shards).exists()]
    context = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(workers, mp_context=context) as pool:
        task = progress.add_task("rows", total=shards, completed=shards - len(todo))
        running = [pool.submit(_build_shard, rows, folder, shard, shards) for shard in todo]
        try:
            for done in as_completed(running):
                done.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build_shard(rows: Rows, folder: Path, shard: int, shards: int) -> None:
    path = _shard_path(folder, shard, shards)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    writer = ArrayRecordWriter(str(partial), "group_size:1")  # one row can be read without its neighbours
    for index in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS):
        writer.write(_packed(rows.sequence(index)))
    writer.close()
    partial.replace(path)


def _packed(sequence: Sequence) -> bytes:
    arrays = {field.name: getattr(sequence, field.name) for field in dataclasses.fields(sequence)}
    arrays["speech"] = arrays["speech"].astype(np.float16)  # as batches carry it, see `pipeline.pad`
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"{shard:05}-of-{shards:05}.array_record"


def _write(path: Path, data: bytes) -> None:
    """All of the file or none of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _read_head(folder: Path) -> dict:
    try:
        return json.loads((folder / "cache.json").read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no cache of rows: build one with `jaxtml data --rows N`") from error
    except ValueError as error:
        raise InputError(f"{folder / 'cache.json'} is damaged: remove the folder and build the cache anew") from error


@dataclass(frozen=True)
class CachedRows:
    """The rows of a finished cache, as a function of their number. Every epoch visits each once, in its own order."""

    config: Config
    folder: Path
    count: int

    @staticmethod
    def open(config: Config, folder: Path, made_from: Rows | None = None) -> CachedRows:
        """Raises `InputError` where there is no finished cache, or one of other rows than `made_from`."""
        head = _read_head(folder)
        shards = head["rows"] // SHARD_ROWS
        missing = sum(not _shard_path(folder, shard, shards).exists() for shard in range(shards))
        if missing:
            raise InputError(
                f"{folder} lacks {missing} of {shards} shards: finish it with `jaxtml data --rows {head['rows']}`"
            )
        if made_from is not None and head["digest"] != digest(made_from):
            raise InputError(f"{folder} is a cache of another bank, config or tokenizer: build a new one")
        return CachedRows(config, folder, head["rows"])

    @cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        shards = self.count // SHARD_ROWS
        return grain.sources.ArrayRecordDataSource([str(_shard_path(self.folder, n, shards)) for n in range(shards)])

    def __getstate__(self) -> dict:
        """Without the open files: a loader's worker processes open their own."""
        return {name: self.__dict__[name] for name in ("config", "folder", "count")}

    def __call__(self, index: int) -> Batch:
        """Row `index` of an endless series, without the batch axis."""
        epoch, within = divmod(index, self.count)
        row = _order(self.config.data.seed, epoch, self.count)[within]
        with np.load(io.BytesIO(self._records[int(row)])) as arrays:
            return pad(Sequence(**{name: arrays[name] for name in arrays.files}), self.config)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """`[count]` the rows in the order of one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)
