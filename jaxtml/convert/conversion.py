"""`jaxtml convert`: converts checkpoints of any size between our format and Inkling's.

The source is a jaxtml checkpoint, a released Inkling checkpoint (bfloat16, NVFP4, MXFP8), or a training run, whose
newest step is read. This module decides what is read and what is written, in which dtype, and with which files.
`convert.streaming` copies, and `convert.verification` verifies. Called by `commands.convert`, tools and tests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from absl import logging

from jaxtml import config as configs
from jaxtml.checkpoint.files import MANIFEST, RUN_CHECKPOINTS
from jaxtml.checkpoint.inkling.layout import ReleaseLayout
from jaxtml.checkpoint.inkling.sink import ReleasedSink, released_dtypes
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.manifest import read_manifest
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.sink import OrbaxSink
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import ParameterSource, spec_table
from jaxtml.checkpoint.tokenizer import missing_tokenizer
from jaxtml.checkpoint.warm_start import WarmStart
from jaxtml.config import Config, to_json
from jaxtml.convert.extra_files import find_extra_files
from jaxtml.convert.streaming import copy_parameters
from jaxtml.convert.verification import check_source, verify_conversion
from jaxtml.errors import InputError
from jaxtml.model.spec import count_parameters
from jaxtml.strict_json import dumps


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "orbax",
    dtype: str | None = None,
    begin_as: str | None = None,
    verify: bool = False,
) -> str:
    """Converts the checkpoint `source` to `destination`, and returns a summary in one line.

    Args:
      source: the directory of a checkpoint or a training run.
      destination: the directory to make; it must be new or empty. With `verify`, it may also be the result of the same
        conversion: then the result is verified again.
      to: "orbax" for a jaxtml checkpoint, "hf" for an Inkling checkpoint.
      dtype: the dtype to write, "float32" or "bfloat16"; None keeps the dtype of each parameter.
      begin_as: the config of a larger model, which starts with the weights of the source (`checkpoint.warm_start`);
        None keeps the source's config.
      verify: whether to compare the source with its own manifest, if it has one, and the result with the source. The
        comparison with the source happens before the result, which is written to a
        hidden folder, is renamed to `destination`.

    Raises:
      InputError: the source is no checkpoint, the destination exists and is not empty, the disk has no room, or
        `verify` found a difference, in the source's own checksums too.
    """
    source, destination = Path(source), Path(destination).resolve()
    if source.resolve() in destination.parents:
        raise InputError(f"{destination} is in {source}: name a directory outside it")
    if destination.is_mount():
        raise InputError(f"{destination} is a mount point: name a new directory in it")
    original = open_checkpoint(source)
    larger = None if begin_as is None else configs.load(begin_as)
    parameters = original if larger is None else WarmStart(original, larger)
    if verify:
        check_source(source)
    step = original.step if isinstance(original, OrbaxCheckpoint) else None
    source_id = _source_id(source, step, larger, to, dtype)
    summary = [f"{source} -> {destination} ({to}): {parameters.config.name}, {_count_parameters(parameters, to)}"]

    missing = missing_tokenizer(source)
    if missing is not None:
        logging.warning("%s; the result will lack it too", missing)

    def check(folder: Path) -> None:
        if verify:
            summary.append(verify_conversion(original, parameters, open_checkpoint(folder), to))

    if verify and (destination / MANIFEST).is_file():
        if not _same_conversion(read_manifest(destination).source, source_id):
            raise InputError(
                f"{destination} was made by another conversion, or {source} has changed since: name a new directory"
            )
        check(destination)
    else:
        layout = _release_layout(original) if begin_as is None else None
        write_checkpoint(parameters, destination, source_id, to, dtype, find_extra_files(source), layout, check)
    return "; ".join(summary)


def write_checkpoint(
    source: ParameterSource,
    destination: Path,
    source_id: str,
    to: str = "orbax",
    dtype: str | None = None,
    extra_files: Mapping[str, Path] = MappingProxyType({}),
    layout: ReleaseLayout | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the parameters of a source as a new checkpoint.

    Args:
      source: the source to read from.
      destination: the directory to make; it must be new or empty.
      source_id: identifies the source and the conversion, so that the same conversion can be resumed.
      to: "orbax" for a jaxtml checkpoint, "hf" for an Inkling checkpoint, without the parameters that Inkling lacks.
      dtype: the dtype to write; None keeps the dtype of each parameter. Parameters that are float32 in every release
        are written as float32 even if `dtype` is "bfloat16".
      extra_files: files to copy into the checkpoint, by name.
      layout: the layout of the release from which the parameters come; None: they come from no release.
      check: a function that is called with the hidden folder before it is renamed; see `copy_parameters`.
    """
    dtypes = {path: source.dtype(path) for path in spec_table(source.config)}
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, np.dtype(dtype)) | released_dtypes(source.config, dtype)
    sink = ReleasedSink if to == "hf" else OrbaxSink
    copy_parameters(source, sink(source.config, dtypes, extra_files, layout), destination, source_id, check)


def _release_layout(original: ReleasedCheckpoint | OrbaxCheckpoint) -> ReleaseLayout | None:
    """Returns the layout of a release, or of the release from which a jaxtml checkpoint was converted."""
    if isinstance(original, OrbaxCheckpoint):
        return ReleaseLayout.kept_in(original.directory)
    files = sorted({tensor.file.name for tensor in original.stored.values()})
    return ReleaseLayout.of_release(original.directory, files)


def _source_id(source: Path, step: int | None, begin_as: Config | None, to: str, dtype: str | None) -> str:
    """Returns a text that identifies a conversion.

    The text changes with the options and with the files of the source (`fingerprint`). It has no digest of the source's
    config, because such a digest would change whenever an update of jaxtml adds a field to the config. So a conversion
    from before the update can still be resumed, or verified again. If there is a config `begin_as`, the text has a
    digest of that config.
    """
    config_digest = "" if begin_as is None else hashlib.sha256(to_json(begin_as).encode()).hexdigest()[:16]
    return dumps([str(source.resolve()), fingerprint(source, step), config_digest, to, dtype])


def _same_conversion(written: str, source_id: str) -> bool:
    """Returns whether the identity that a manifest has (`written`) stands for the same conversion as `source_id`.

    In 0.1.0 the identity always had a digest of the config that is written. If this is the source's own config, the
    digest is ignored: the files of the source decide the config, and the identity has their fingerprint.
    """
    expected = json.loads(source_id)
    try:
        found = json.loads(written)
    except ValueError:
        return False
    if isinstance(found, list) and len(found) == len(expected) and expected[2] == "":
        found[2] = ""
    return found == expected


def fingerprint(directory: Path, step: int | None = None) -> str:
    """Returns a digest of the names, sizes and times of all files of a checkpoint, or of one step of a training run."""
    folder = directory if step is None else directory / RUN_CHECKPOINTS / str(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _count_parameters(source: ParameterSource, to: str) -> str:
    """Returns a phrase: how many parameters are written, which of them the source lacks, and which are left out."""
    specs = spec_table(source.config)
    new = {path for path in specs if not source.holds(path)}
    left_out = {path for path, spec in specs.items() if to == "hf" and spec.released is None}

    def count(paths: set[str]) -> int:
        return count_parameters({path: specs[path] for path in paths})[0]

    def describe(paths: set[str]) -> str:
        return f"{count(paths):,} ({', '.join(sorted({path.split('/')[0] for path in paths}))})"

    phrase = f"{count(specs.keys() - left_out):,} parameters"
    if new - left_out:
        phrase += f", {describe(new - left_out)} of them new, with initial values"
    if left_out - new:
        phrase += f"; {describe(left_out - new)} left out, for which Inkling has no place"
    return phrase
