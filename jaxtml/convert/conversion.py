"""`jaxtml convert`: checkpoints in and out, streamed, whatever their size.

A source is one of our checkpoints, a released Inkling directory (bfloat16, NVFP4, MXFP8), or the workdir of a training
run (its newest step).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxtml import config as configs
from jaxtml.checkpoint.files import MANIFEST, RUN_CHECKPOINTS
from jaxtml.checkpoint.inkling.sink import ReleasedSink, released_dtypes
from jaxtml.checkpoint.manifest import read_manifest
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.sink import OrbaxSink
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import ParameterSource, spec_table
from jaxtml.checkpoint.warm_start import WarmStart
from jaxtml.config import to_json
from jaxtml.convert import streaming
from jaxtml.convert.extra_files import find_extra_files
from jaxtml.convert.verification import verify_conversion
from jaxtml.errors import InputError
from jaxtml.model.spec import count_parameters


def write_checkpoint(
    source: ParameterSource,
    destination: Path,
    source_id: str,
    to: str = "orbax",
    dtype: str | None = None,
    extra_files: Mapping[str, Path] = MappingProxyType({}),
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes all of a source (to="hf": what Inkling has) as `dtype`, None: as it is held, with the files `extra_files`
    (by name). What `check` raises of the folder keeps it from its name."""
    dtypes = {path: source.dtype(path) for path in spec_table(source.config)}
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, np.dtype(dtype)) | released_dtypes(source.config, dtype)
    kind = ReleasedSink if to == "hf" else OrbaxSink
    streaming.copy_parameters(source, kind(source.config, dtypes, extra_files), destination, source_id, check)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "orbax",
    dtype: str | None = None,
    begin_as: str | None = None,
    verify: bool = False,
) -> str:
    """Writes `source` to `destination` as an Orbax checkpoint of ours or in the released layout; returns a summary.

    Args:
      source: a directory.
      destination: one that is not there, or is empty; to be verified, the result of the same conversion too.
      to: "orbax" or "hf".
      dtype: what parameters become; None: nothing else than they are.
      begin_as: a config that begins with the source's weights (`checkpoint.warm_start`).
      verify: read the result and hold it to the source, before it gets its name.

    Raises:
      InputError: the source is no checkpoint, the destination exists and is not empty, the disk has no room, or
        `verify` found a difference.
    """
    source, destination = Path(source), Path(destination).resolve()
    if source.resolve() in destination.parents:
        raise InputError(f"{destination} is in {source}: name a directory outside it")
    if destination.is_mount():
        raise InputError(f"{destination} is a mount point: name a new directory in it")
    held = open_checkpoint(source)
    given = held if begin_as is None else WarmStart(held, configs.load(begin_as))
    step = held.step if isinstance(held, OrbaxCheckpoint) else None
    asked = hashlib.sha256(to_json(given.config).encode()).hexdigest()[:16]
    source_id = json.dumps([str(source.resolve()), fingerprint(source, step), asked, to, dtype])
    said = [f"{source} -> {destination} ({to}): {given.config.name}, {_counted(given, to)}"]

    def check(folder: Path) -> None:
        if verify:
            said.append(verify_conversion(held, given, open_checkpoint(folder), to))

    if verify and (destination / MANIFEST).is_file():
        if read_manifest(destination).source != source_id:
            raise InputError(f"{destination} was made of another {source} than it is now, or by another conversion")
        check(destination)
    else:
        write_checkpoint(given, destination, source_id, to, dtype, find_extra_files(source), check)
    return "; ".join(said)


def _counted(source: ParameterSource, to: str) -> str:
    """How many parameters a conversion wrote, which of them the source did not hold, and which it left out."""
    specs = spec_table(source.config)
    missing = {path for path in specs if not source.holds(path)}
    unwanted = {path for path, spec in specs.items() if to == "hf" and spec.released is None}

    def of(paths: set[str]) -> int:
        return count_parameters({path: specs[path] for path in paths})[0]

    def told(paths: set[str]) -> str:
        return f"{of(paths):,} ({', '.join(sorted({path.split('/')[0] for path in paths}))})"

    said = f"{of(specs.keys() - unwanted):,} parameters"
    if missing - unwanted:
        said += f", {told(missing - unwanted)} of them new, drawn as for training"
    if unwanted - missing:
        said += f"; {told(unwanted - missing)} left out, for which Inkling has no place"
    return said


def fingerprint(directory: Path, step: int | None = None) -> str:
    """Changes with any file of a checkpoint, or of a run's step: of names, sizes and times."""
    folder = directory if step is None else directory / RUN_CHECKPOINTS / str(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [(str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
