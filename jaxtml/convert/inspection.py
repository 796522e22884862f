"""`jaxtml info DIR`: says what a checkpoint is, without reading its values. With `--verify`, checks all values.

Called by `commands.info`.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from absl import logging

from jaxtml.checkpoint.chunks import LayerChunks, layer_chunks, parameter_bytes
from jaxtml.checkpoint.files import RUN_CHECKPOINTS
from jaxtml.checkpoint.inkling.safetensors_file import DTYPES, StoredTensor
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.manifest import TensorRecord, crc32, file_checksums, read_manifest
from jaxtml.checkpoint.nonfinite import has_nonfinite
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import ParameterSource, spec_table
from jaxtml.checkpoint.tokenizer import missing_tokenizer
from jaxtml.config import Config
from jaxtml.convert.progress import CopyProgress
from jaxtml.convert.threads import run_in_threads
from jaxtml.errors import InputError, join_names
from jaxtml.model.spec import ParamSpec

_BLOCK_BYTES = 2**23  # a released tensor is read in blocks of this size


@dataclass(frozen=True)
class Description:
    """What a checkpoint is.

    Attributes:
      config: the config of the model.
      specs: the specs of the parameters that the checkpoint has.
      kind: a phrase that says what kind of checkpoint it is.
      step: the newest step of a training run; None for other checkpoints.
      dtypes: how many elements have each dtype.
      nbytes: the size on disk in bytes.
      uses: the commands that can use the checkpoint.
      lacks: a line for each thing that the checkpoint lacks: what it is needed for, and the remedy.
    """

    config: Config
    specs: dict[str, ParamSpec]
    kind: str
    step: int | None
    dtypes: dict[str, int]
    nbytes: int
    uses: list[str]
    lacks: list[str]


def describe_checkpoint(directory: str | Path) -> Description:
    """Describes a checkpoint. Raises `InputError` if the directory has no checkpoint that can be read."""
    directory = Path(directory)
    source = open_checkpoint(directory)
    specs = _held_specs(source)
    dtypes: Counter[str] = Counter()
    for path, spec in specs.items():
        dtypes[source.dtype(path).name] += math.prod(spec.shape)
    folder, step, uses = directory, None, ["logits", "convert"]
    if isinstance(source, ReleasedCheckpoint):
        formats = sorted({"NVFP4" if ".scale2" in scales else "MXFP8" for scales in source.scales.values()})
        kind = f"Inkling checkpoint{', routed experts in ' + ' and '.join(formats) if formats else ''}"
    elif source.step is not None:
        kind, step, folder = "training run", source.step, directory / RUN_CHECKPOINTS / str(source.step)
        uses.append("train --workdir")
    else:
        kind = "jaxtml checkpoint"
    uses.append("train --start-from")
    missing = missing_tokenizer(directory)
    if missing is None:
        uses += ["converse", "serve"]
    nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Description(
        source.config, specs, kind, step, dict(dtypes), nbytes, uses, [] if missing is None else [missing]
    )


def _held_specs(source: ParameterSource) -> dict[str, ParamSpec]:
    return {path: spec for path, spec in spec_table(source.config).items() if source.holds(path)}


def verify_manifest(directory: str | Path) -> int:
    """Reads a converted checkpoint and compares every tensor and file with the checksums in its manifest.

    Returns:
      How many tensors there are.

    Raises:
      InputError: the directory has no checkpoint or no manifest, tensors or files have changed, or tensors have NaN or
        infinite values. The message names at most five of them. The log names all that have changed.
    """
    directory = Path(directory)
    changed, nonfinite, tensors = compare_with_manifest(directory)
    if changed:
        logging.info("all that has changed:\n%s", "\n".join(changed))
        raise InputError(f"{directory} has changed since it was converted, convert again: {join_names(changed)} differ")
    if nonfinite:
        raise InputError(
            f"{directory} is as it was written, and {len(nonfinite)} of {tensors} tensors have NaN or infinite "
            f"values: {join_names(nonfinite)}; convert a sound checkpoint"
        )
    return tensors


def compare_with_manifest(directory: Path) -> tuple[list[str], list[str], int]:
    """Reads a converted checkpoint and compares it with its manifest.

    Returns:
      The names of files and tensors that differ, the names of tensors with NaN or infinite values, and how many tensors
      there are.

    Raises:
      InputError: the directory has no checkpoint or no manifest.
    """
    manifest, source = read_manifest(directory), open_checkpoint(directory)
    tensors = list(_recorded_tensors(source))
    progress = CopyProgress(parameter_bytes(_held_specs(source), source.dtype), 0, "verified ")
    nonfinite: set[str] = set()

    def record(tensor: _RecordedTensor, stop: threading.Event) -> tuple[str, TensorRecord | None]:
        checksum = 0
        try:
            for values in tensor.blocks():
                if stop.is_set():
                    raise CancelledError
                checksum = crc32(values, checksum)
                if has_nonfinite(values):
                    nonfinite.add(tensor.name)
                progress.add(values.nbytes)
        except InputError:  # a chunk is missing or damaged
            return tensor.name, None
        return tensor.name, TensorRecord.create(tensor.dtype, tensor.shape, checksum)

    files = file_checksums(directory, manifest.files)
    changed = [name for name, checksum in manifest.files.items() if files.get(name) != checksum]
    records = dict(run_in_threads(record, tensors))
    names = sorted({*records, *manifest.tensors})
    changed += [name for name in names if records.get(name) != manifest.tensors.get(name)]
    return changed, sorted(nonfinite), len(records)


@dataclass(frozen=True)
class _RecordedTensor:
    """A tensor that a manifest has a record of. `blocks()` yields its values in the order of its checksum."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def _recorded_tensors(source: ReleasedCheckpoint | OrbaxCheckpoint) -> Iterator[_RecordedTensor]:
    if isinstance(source, ReleasedCheckpoint):
        for name, stored in source.stored.items():
            yield _RecordedTensor(name, stored.dtype, stored.shape, partial(_read_blocks, stored))
        return
    for layer in layer_chunks(source.specs, source.chunk_shape):
        spec = source.specs[layer.path]
        dtype, shape = source.dtype(layer.path).name, spec.shape[spec.stacked :]
        yield _RecordedTensor(layer.name, dtype, shape, partial(_read_chunks, source, layer))


def _read_blocks(stored: StoredTensor) -> Iterator[np.ndarray]:
    return (block.view(DTYPES.get(stored.dtype, np.uint8)) for block in stored.blocks(_BLOCK_BYTES))


def _read_chunks(source: OrbaxCheckpoint, layer: LayerChunks) -> Iterator[np.ndarray]:
    return (source.read(layer.path, index) for index in layer.indices)
