"""Copies parameters from a source into a sink: chunk by chunk, in threads, so that an interrupted copy can go on.

The copy is written to a hidden folder beside the destination. When the copy is complete, the folder is renamed to the
destination. A journal in the folder says which chunks are written (`convert.journal`). If a conversion was killed, the
next one copies the other chunks.

One thread works through the chunks of one layer's part of a parameter, in order, and computes the CRC-32 of all that it
has written (`checkpoint.manifest`). Memory is one chunk for each thread, whatever the size of the model.

Called by `convert.conversion`.
"""

from __future__ import annotations

import errno
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
from jaxtml.checkpoint.nonfinite import has_nonfinite
from jaxtml.checkpoint.sink import ParameterSink
from jaxtml.checkpoint.source import ParameterSource
from jaxtml.convert.journal import JOURNAL, Journal
from jaxtml.convert.progress import CopyProgress, byte_unit
from jaxtml.convert.tensor_names import source_names
from jaxtml.convert.threads import run_in_threads
from jaxtml.convert.verification import VerificationFailed
from jaxtml.errors import InputError, join_names
from jaxtml.strict_json import dumps


def copy_parameters(
    source: ParameterSource,
    sink: ParameterSink,
    destination: Path,
    source_id: str,
    check: Callable[[Path], None] = lambda folder: None,
    workers: int | None = None,
) -> None:
    """Fills the sink in a hidden folder, writes the manifest, and renames the folder to `destination`.

    Args:
      source: the source to read from.
      sink: the sink to write to.
      destination: the directory to make; it must be new or empty.
      source_id: identifies the source and the conversion. A conversion with another id is not resumed.
      check: a function that is called with the folder before it is renamed. If it raises, the folder keeps its hidden
        name. If it raises `VerificationFailed`, the next conversion begins anew.
      workers: the number of threads; None takes two for each core.

    Raises:
      InputError: the destination is not empty, its folder is missing, it may not be written or is being written by
        another conversion; or the disk has no room; or `check` raised.
    """
    if not destination.parent.is_dir():
        is_file = destination.parent.exists()
        problem = "{} is a file; name another folder" if is_file else "there is no folder {}; make it first"
        raise InputError(f"cannot write {destination}: {problem.format(destination.parent)}")
    if not os.access(destination.parent, os.W_OK):
        raise InputError(
            f"cannot write {destination}: {destination.parent} is read-only for this user; name another folder"
        )
    folder = destination.with_name(f".{destination.name}.converting")
    work = conversion_chunks(sink.specs, sink.dtype)
    total = parameter_bytes(sink.specs, sink.dtype)
    identity = [source_id, total, len(work), *([sink.layout_id] if sink.layout_id else [])]
    with closing(Journal(folder, dumps(identity))) as journal:
        try:
            _check_room(destination, total - journal.bytes_written)
        except InputError:
            if not journal.bytes_written:
                shutil.rmtree(folder)
            raise
        _log_where_it_goes_on(destination, journal, work, total)
        sink.prepare(folder)
        journal.begin()
        try:
            records = _copy_chunks(source, sink, work, journal, CopyProgress(total, journal.bytes_written), workers)
            if journal.nonfinite:
                names = join_names(source_names(source, work, journal.nonfinite))
                logging.warning(
                    "%s has NaN or infinite values in %d of %d tensors, as its source has: %s",
                    destination, len(journal.nonfinite), len(work), names,
                )  # fmt: skip
            write_manifest(folder, source_id, records)
            os.sync()
            check(folder)
        except KeyboardInterrupt:
            logging.info("the chunks so far stay in %s: convert again to go on, or remove this folder", folder)
            raise
        except VerificationFailed as error:
            journal.forget()
            raise VerificationFailed(f"{error}; the result is in {folder}: look at it, then remove it") from error
        if destination.exists():
            destination.rmdir()  # an empty folder
        folder.rename(destination)
        (destination / JOURNAL).unlink()  # last: a conversion that is killed earlier needs the journal to go on


def _copy_chunks(
    source: ParameterSource,
    sink: ParameterSink,
    work: list[LayerChunks],
    journal: Journal,
    progress: CopyProgress,
    workers: int | None,
) -> dict[str, TensorRecord]:
    """Copies the chunks that the journal does not have. Returns the manifest's record of each tensor by its name."""

    def copy_layer(layer: LayerChunks, stop: threading.Event) -> tuple[str, TensorRecord]:
        done, checksum = journal.done.get(layer.name, (0, 0))
        for chunks, index in enumerate(layer.indices[done:], done + 1):
            if stop.is_set():
                raise CancelledError
            values = source.read(layer.path, index).astype(sink.dtype(layer.path), copy=False)
            checksum = crc32(sink.write(layer.path, index, values), checksum)
            journal.note(layer.name, chunks, checksum, values.nbytes, has_nonfinite(values))
            progress.add(values.nbytes)
        return sink.manifest_record(layer.path, layer.position, checksum)

    try:
        return dict(run_in_threads(copy_layer, work, workers))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = journal.file.parent
        raise InputError(
            f"{folder}: the disk is full; make room and convert again: the conversion goes on from here"
        ) from error


def _log_where_it_goes_on(destination: Path, journal: Journal, work: list[LayerChunks], total: int) -> None:
    """Says what an interrupted conversion has written, if there was one. `total` is the size of all tensors."""
    if not journal.bytes_written:
        return
    tensors = sum(journal.done.get(layer.name, (0, 0))[0] == len(layer.indices) for layer in work)
    unit, name = byte_unit(total)
    logging.info(
        "%s: going on with an earlier conversion, which has written %d of %d tensors, %.1f of %.1f %s",
        destination, tensors, len(work), journal.bytes_written / unit, total / unit, name,
    )  # fmt: skip


def _check_room(destination: Path, needed: int) -> None:
    """Raises `InputError` unless the destination is new or empty and its disk has room for `needed` bytes."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists: name a new directory")
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        unit, name = byte_unit(needed)
        raise InputError(
            f"{destination} needs {needed / unit:.1f} {name}, and its disk has {free / unit:.1f} {name} left: "
            "make room, or name a directory on another disk"
        )
