"""`jaxtml info DIR`: what a checkpoint is, without reading its numbers; `--verify`: whether they are still there."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxtml.checkpoint.chunks import layer_chunks, parameter_bytes
from jaxtml.checkpoint.files import RUN_CHECKPOINTS, TOKENIZER
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.manifest import TensorRecord, crc32, file_checksums, read_manifest
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import ParameterSource, spec_table
from jaxtml.config import Config
from jaxtml.convert.progress import CopyProgress
from jaxtml.convert.threads import run_in_threads
from jaxtml.errors import InputError, join_names
from jaxtml.model.spec import ParamSpec

_BLOCK = 2**23  # bytes that are summed at once


def describe_checkpoint(directory: str | Path) -> tuple[Config, dict[str, ParamSpec], dict[str, Any]]:
    """The config of a checkpoint, the parameters that it holds, and `kind`, `step` (of a run; else None), `dtypes`
    (numbers of each, as held), `bytes` on disk and `uses`: what can be done with it. Raises `InputError` where it is
    none."""
    directory = Path(directory)
    source = open_checkpoint(directory)
    held = _held(source)
    dtypes: Counter[str] = Counter()
    for path, spec in held.items():
        dtypes[source.dtype(path).name] += math.prod(spec.shape)
    folder, step, uses = directory, None, ["logits", "convert"]
    if isinstance(source, ReleasedCheckpoint):
        formats = sorted({"NVFP4" if ".scale2" in parts else "MXFP8" for parts in source.parts.values()})
        kind = f"Inkling checkpoint{', routed experts in ' + ' and '.join(formats) if formats else ''}"
    else:
        step = source.step
        kind = "training run" if step is not None else "jaxtml checkpoint"
        folder = directory / RUN_CHECKPOINTS / str(step) if step is not None else directory
        uses += ["train (goes on)"] if step is not None else []
    uses += ["train --start-from", *(["converse"] if (directory / TOKENIZER).is_file() else [])]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return source.config, held, {"kind": kind, "step": step, "dtypes": dict(dtypes), "bytes": size, "uses": uses}


def _held(source: ParameterSource) -> dict[str, ParamSpec]:
    return {path: spec for path, spec in spec_table(source.config).items() if source.holds(path)}


def verify_manifest(directory: str | Path) -> int:
    """Reads all of what a conversion wrote and holds it to the checksums in its manifest; returns how many tensors.

    Raises:
      InputError: the directory is no checkpoint or has no manifest, or tensors or files are others than were written
        (five are named).
    """
    directory = Path(directory)
    wanted, source = read_manifest(directory), open_checkpoint(directory)
    parts = dict(_parts(source))
    progress = CopyProgress(parameter_bytes(_held(source), source.dtype), 0, "verified ")

    def one(name: str, stop: threading.Event) -> tuple[str, TensorRecord | None]:
        dtype, shape, blocks = parts[name]
        found = 0
        try:
            for values in blocks():
                if stop.is_set():
                    raise CancelledError
                found = crc32(values, found)
                progress.add(values.nbytes)
        except InputError:  # a chunk that is not there, or damaged
            return name, None
        return name, TensorRecord.of(dtype, shape, found)

    files = file_checksums(directory, wanted.files)
    changed = [name for name, checksum in wanted.files.items() if files.get(name) != checksum]
    found = dict(run_in_threads(one, list(parts), None))
    changed += [name for name in sorted({*found, *wanted.tensors}) if found.get(name) != wanted.tensors.get(name)]
    if changed:
        logging.info("all that differ:\n%s", "\n".join(changed))
        raise InputError(f"{directory} is not as it was written: {join_names(changed)} differ")
    return len(found)


def _parts(
    source: ReleasedCheckpoint | OrbaxCheckpoint,
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], Callable[[], Iterator[np.ndarray]]]]]:
    """What a manifest has a checksum of, by name: dtype, shape, and its bytes as they lie there."""
    if isinstance(source, ReleasedCheckpoint):
        for name, stored in source.tensors.items():
            yield name, (stored.dtype, stored.shape, lambda stored=stored: stored.blocks(_BLOCK))
    else:
        for layer in layer_chunks(source.specs, source.chunk_shape):
            spec = source.specs[layer.path]
            blocks = lambda layer=layer: (source.read(layer.path, index) for index in layer.indices)  # noqa: E731
            yield layer.name, (source.dtype(layer.path).name, spec.shape[spec.stacked :], blocks)
