"""A conversion: chunk after chunk from a source into a sink, side by side, resumable, counted and checked.

What is written lies in a hidden folder beside the destination until all of it is there, and then takes its name. A
journal in that folder says which chunks are done: a conversion that was killed goes on with the next ones. Every
layer's part of a parameter is worked through in order by one thread, which keeps a CRC-32 of all that it wrote
(`checkpoint.manifest`). Memory is a chunk for each thread, whatever the model's size. Called by `convert.conversion`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path

from absl import logging

from jaxtml.checkpoint.chunks import LayerChunks, conversion_chunks, parameter_bytes
from jaxtml.checkpoint.manifest import TensorRecord, crc32, write_manifest
from jaxtml.checkpoint.sink import ParameterSink
from jaxtml.checkpoint.source import ParameterSource
from jaxtml.convert.journal import JOURNAL, Journal
from jaxtml.convert.progress import CopyProgress
from jaxtml.convert.threads import run_in_threads
from jaxtml.convert.verification import VerificationFailed
from jaxtml.errors import InputError


def copy_parameters(
    source: ParameterSource,
    sink: ParameterSink,
    destination: Path,
    source_id: str,
    check: Callable[[Path], None] = lambda folder: None,
    workers: int | None = None,
) -> None:
    """Fills the sink, writes its manifest and gives it its name.

    Args:
      source: to read from.
      sink: to write to.
      destination: a folder that is not there, or empty.
      source_id: what identifies the source: a conversion of another one is not resumed.
      check: called with the folder before it gets its name; what this raises keeps it from it, and where that is
        `VerificationFailed`, the next conversion begins anew.
      workers: threads; None: two for each core, as half of them wait for the disk.

    Raises:
      InputError: the destination is not empty, in no folder, or being written by another conversion, or the disk has
        no room for it; or what `check` raised.
    """
    folder = destination.with_name(f".{destination.name}.converting")
    work = conversion_chunks(sink.specs, sink.dtype)
    total = parameter_bytes(sink.specs, sink.dtype)
    if not destination.parent.is_dir():
        raise InputError(f"cannot write {destination}: there is no folder {destination.parent}")
    if not os.access(destination.parent, os.W_OK):
        raise InputError(f"cannot write {destination}: the permissions of {destination.parent} do not allow it")
    with closing(Journal(folder, json.dumps([source_id, total, len(work)]))) as journal:
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
            write_manifest(folder, source_id, tensors)
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
    sink: ParameterSink,
    work: list[LayerChunks],
    journal: Journal,
    progress: CopyProgress,
    workers: int | None,
) -> dict[str, TensorRecord]:
    """Writes what the journal does not have yet; what each layer then is, by its name."""

    def one(layer: LayerChunks, stop: threading.Event) -> tuple[str, TensorRecord]:
        done, checksum = journal.done.get(layer.name, (0, 0))
        for count, index in enumerate(layer.indices[done:], done + 1):
            if stop.is_set():
                raise CancelledError
            values = source.read(layer.path, index).astype(sink.dtype(layer.path), copy=False)
            checksum = crc32(sink.write(layer.path, index, values), checksum)
            journal.note(layer.name, count, checksum, values.nbytes)
            progress.add(values.nbytes)
        return sink.manifest_record(layer.path, layer.at, checksum)

    try:
        return dict(run_in_threads(one, work, workers))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        said = "the disk is full; make room and convert again, it goes on from here"
        raise InputError(f"{journal.file.parent}: {said}") from error


def _check_room(destination: Path, needed: int) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists: name a new directory")
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise InputError(
            f"{destination} needs {needed / 1e9:.1f} GB, {destination.parent} has {free / 1e9:.1f} GB left"
        )
