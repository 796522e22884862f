"""A conversion: chunk after chunk from a source into a sink, side by side, resumable, counted and checked.

What is written lies in a hidden folder beside the destination until all of it is there, and then takes its name. A
journal in that folder says which chunks are done: a conversion that was killed goes on with the next ones. Every
layer's part of a parameter is worked through in order by one thread, which keeps a CRC-32 of all that it wrote
(`checkpoint.manifest`). Memory is a chunk for each thread, whatever the model's size. Called by `convert.conversion`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from jaxtml.checkpoint import manifest
from jaxtml.checkpoint.manifest import Tensor, crc32, layer_name
from jaxtml.checkpoint.orbax_sink import chunk_shape, chunks
from jaxtml.checkpoint.source import Index, ParameterSource
from jaxtml.errors import InputError
from jaxtml.model.spec import ParamSpec

JOURNAL = "journal.jsonl"
REPORT_S = 5.0  # seconds between lines of progress
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Sink(Protocol):
    """Where parameters go: a checkpoint in the making."""

    specs: dict[str, ParamSpec]

    def dtype(self, path: str) -> np.dtype: ...

    def prepare(self, folder: Path) -> None:
        """Makes everything but the numbers in `folder`; one that a killed conversion prepared is kept."""
        ...

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        """Writes one of `store.chunks` and returns it as it lies there, contiguous; threads write different ones side
        by side."""
        ...

    def told(self, path: str, at: tuple[int, ...], crc32: int) -> tuple[str, Tensor]:
        """What one layer's part of a parameter is called there, and is."""
        ...


class VerificationFailed(InputError):
    """A result is not what it was made of."""


@dataclass(frozen=True)
class LayerChunks:
    """One layer's part of a parameter, or all of one that is in no layer: a tensor of a release."""

    path: str
    at: tuple[int, ...]
    indices: tuple[Index, ...]

    @property
    def name(self) -> str:
        return layer_name(self.path, self.at)


def layers(specs: Mapping[str, ParamSpec], size: Callable[[str], Sequence[int]]) -> Iterator[LayerChunks]:
    """All of them, each with its chunks of the size that a parameter has, in order."""
    for path, spec in specs.items():
        found: dict[tuple[int, ...], list[Index]] = {}
        for index in chunks(spec, size(path)):
            found.setdefault(tuple(cut.start for cut in index[: spec.stacked]), []).append(index)
        for at, indices in found.items():
            yield LayerChunks(path, at, tuple(indices))


def written(specs: Mapping[str, ParamSpec], dtype: Callable[[str], np.dtype]) -> list[LayerChunks]:
    """All of them in the chunks in which a conversion works."""
    return list(layers(specs, lambda path: chunk_shape(specs[path], dtype(path).itemsize)))


def nbytes(specs: Mapping[str, ParamSpec], dtype: Callable[[str], np.dtype]) -> int:
    return sum(int(np.prod(spec.shape, dtype=np.int64)) * dtype(path).itemsize for path, spec in specs.items())


def convert(
    source: ParameterSource,
    sink: Sink,
    destination: Path,
    made_from: str,
    check: Callable[[Path], None] = lambda folder: None,
    workers: int | None = None,
) -> None:
    """Fills the sink, writes its manifest and gives it its name.

    Args:
      source: to read from.
      sink: to write to.
      destination: a folder that is not there, or empty.
      made_from: what identifies the source: a conversion of another one is not resumed.
      check: called with the folder before it gets its name; what this raises keeps it from it, and where that is
        `VerificationFailed`, the next conversion begins anew.
      workers: threads; None: two for each core, as half of them wait for the disk.

    Raises:
      InputError: the destination is not empty, in no folder, or being written by another conversion, or the disk has
        no room for it; or what `check` raised.
    """
    folder = destination.with_name(f".{destination.name}.converting")
    work = written(sink.specs, sink.dtype)
    total = nbytes(sink.specs, sink.dtype)
    if not destination.parent.is_dir():
        raise InputError(f"cannot write {destination}: there is no folder {destination.parent}")
    if not os.access(destination.parent, os.W_OK):
        raise InputError(f"cannot write {destination}: the permissions of {destination.parent} do not allow it")
    with closing(Journal(folder, json.dumps([made_from, total, len(work)]))) as journal:
        try:
            _check_room(destination, total - journal.written)
        except InputError:
            if not journal.written:
                shutil.rmtree(folder)
            raise
        if journal.written:
            logging.info("%s: going on after %.1f of %.1f GB", destination, journal.written / 1e9, total / 1e9)
        sink.prepare(folder)
        journal.begin()
        try:
            tensors = _filled(source, sink, work, journal, CopyProgress(total, journal.written), workers)
            manifest.write(folder, made_from, tensors)
            os.sync()
            check(folder)
        except KeyboardInterrupt:
            logging.info("what is written is kept in %s: convert again to go on, or remove it", folder)
            raise
        except VerificationFailed as error:
            journal.forget()
            raise VerificationFailed(
                f"{error}; the result is left as {folder}, for you to look at and remove"
            ) from error
        if destination.exists():
            destination.rmdir()  # an empty folder
        folder.rename(destination)
        (destination / JOURNAL).unlink()  # last: until here, a conversion that is killed goes on


def _filled(
    source: ParameterSource,
    sink: Sink,
    work: list[LayerChunks],
    journal: Journal,
    progress: CopyProgress,
    workers: int | None,
) -> dict[str, Tensor]:
    """Writes what the journal does not have yet; what each layer then is, by its name."""

    def one(layer: LayerChunks, stop: threading.Event) -> tuple[str, Tensor]:
        done, checksum = journal.done.get(layer.name, (0, 0))
        for count, index in enumerate(layer.indices[done:], done + 1):
            if stop.is_set():
                raise CancelledError
            values = source.read(layer.path, index).astype(sink.dtype(layer.path), copy=False)
            checksum = crc32(sink.write(layer.path, index, values), checksum)
            journal.note(layer.name, count, checksum, values.nbytes)
            progress.add(values.nbytes)
        return sink.told(layer.path, layer.at, checksum)

    try:
        return dict(side_by_side(one, work, workers))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        said = "the disk is full; make room and convert again, it goes on from here"
        raise InputError(f"{journal.file.parent}: {said}") from error


def verify(
    source: ParameterSource, result: ParameterSource, specs: Mapping[str, ParamSpec], workers: int | None = None
) -> int:
    """Holds every layer of `result` to the source, in the dtype of the result, by checksums; returns how many.

    Raises:
      Differs: the first layer is named, all of them in the log.
    """

    def checksum(of: ParameterSource, layer: LayerChunks, stop: threading.Event) -> int:
        found = 0
        for index in layer.indices:
            if stop.is_set():
                raise CancelledError
            values = of.read(layer.path, index).astype(result.dtype(layer.path), copy=False)
            found = crc32(values, found)
            progress.add(values.nbytes)
        return found

    def one(layer: LayerChunks, stop: threading.Event) -> str | None:
        return None if checksum(source, layer, stop) == checksum(result, layer, stop) else layer.name

    work, progress = written(specs, result.dtype), CopyProgress(2 * nbytes(specs, result.dtype), 0, "verified ")
    wrong = sorted(name for name in side_by_side(one, work, workers) if name)
    if wrong:
        logging.info("all that differ:\n%s", "\n".join(wrong))
        raise VerificationFailed(
            f"the result differs from its source in {len(wrong)} of {len(work)} layers, first in {wrong[0]}"
        )
    return len(work)


def side_by_side(one: Callable[[Any, threading.Event], Any], work: list[Any], workers: int | None) -> list[Any]:
    """`one` of each, by threads; the first exception ends it all, those under way at their next chunk."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        futures: list[Future[Any]] = [pool.submit(one, layer, stop) for layer in work]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _check_room(destination: Path, needed: int) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists: name a new directory")
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise InputError(
            f"{destination} needs {needed / 1e9:.1f} GB, {destination.parent} has {free / 1e9:.1f} GB left"
        )


class Journal:
    """Which chunks of a conversion are written. One from before the machine last started is worth nothing: what was not
    yet on the disk then is lost. As long as it is not closed, the folder is its own."""

    def __init__(self, folder: Path, identity: str):
        folder.mkdir(exist_ok=True)
        self.folder = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.folder)
            raise InputError(f"{folder} is being written by another conversion") from error
        self.file, self.lock = folder / JOURNAL, threading.Lock()
        boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
        self.head = {"identity": identity, "boot": boot}
        self.done: dict[str, tuple[int, int]] = {}  # layer -> chunks, CRC-32 of them
        self.written = 0
        self.opened: Any = None
        lines = self.file.read_text(errors="replace").splitlines() if self.file.is_file() else []
        if not lines or _parsed(lines[0]) != self.head:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            return
        for line in lines[1:]:
            entry = _parsed(line)
            if entry is None:  # the last, half written
                continue
            self.done[entry["layer"]] = (entry["chunks"], entry["crc32"])
            self.written += entry["bytes"]

    def forget(self) -> None:
        """The next conversion begins anew."""
        self.file.unlink()

    def begin(self) -> None:
        """The folder is prepared: chunks will be noted."""
        begun = self.file.is_file()
        self.opened = open(self.file, "a")  # noqa: SIM115 (closed by `close`)
        self._append(None if begun else self.head)

    def note(self, layer: str, count: int, checksum: int, size: int) -> None:
        self._append({"layer": layer, "chunks": count, "crc32": checksum, "bytes": size})

    def _append(self, entry: dict[str, Any] | None) -> None:
        """None ends a line that may have been cut off."""
        with self.lock:
            self.opened.write("\n" if entry is None else json.dumps(entry) + "\n")
            self.opened.flush()

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
        os.close(self.folder)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class CopyProgress:
    """A line every few seconds: bytes, rate, time left."""

    def __init__(self, total: int, done: int, what: str = ""):
        self.total, self.done, self.before, self.what = total, done, done, what
        self.began = self.told = time.monotonic()
        self.lock = threading.Lock()

    def add(self, size: int) -> None:
        with self.lock:
            self.done += size
            now = time.monotonic()
            if now - self.told < REPORT_S and self.done < self.total:
                return
            self.told = now
            rate = (self.done - self.before) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / rate
            unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
            logging.info(
                "%s%.1f of %.1f %s  %.2f %s/s  %d:%02d left",
                self.what, self.done / unit, self.total / unit, name, rate / unit, name, *divmod(round(left), 60),
            )  # fmt: skip
