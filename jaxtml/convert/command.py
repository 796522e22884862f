"""`jaxtml convert`: checkpoints in and out, streamed, whatever their size.

A source is one of our checkpoints, a released Inkling directory (bfloat16, NVFP4, MXFP8), or the workdir of a training
run (its newest step).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from jaxtml import config as configs
from jaxtml.config import Config, to_json
from jaxtml.convert import streaming
from jaxtml.convert.checkpoint import RUN, TOKENIZER, OrbaxCheckpoint, on_one_device
from jaxtml.convert.export import ReleasedSink, released_dtypes
from jaxtml.convert.released import ReleasedCheckpoint
from jaxtml.convert.source import Source, placed, table
from jaxtml.convert.store import OrbaxSink
from jaxtml.convert.warm import WarmStart
from jaxtml.errors import InputError
from jaxtml.model.spec import Params, count

SMALL = 2**31  # bytes of parameters up to which logits are compared too
PROMPT = 64  # tokens of that comparison


def opened(directory: str | Path) -> Source:
    """Any checkpoint that we know as a source. Raises `InputError` where it is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}")
    if any(directory.glob("*.safetensors")):
        return ReleasedCheckpoint(directory)
    return OrbaxCheckpoint(directory)


def read(directory: str | Path, dtype: str = "float32") -> tuple[Config, Params]:
    """Config and parameters of any checkpoint that we know, on the first device. Raises `InputError` as `opened`."""
    source = opened(directory)
    return source.config, placed(source, on_one_device(source.config, dtype))


def write(
    source: Source,
    destination: Path,
    made_from: str,
    to: str = "orbax",
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> dict[str, np.dtype]:
    """Writes all of a source (to="hf": what Inkling has) as `dtype`, None: as it is held; returns what became what."""
    dtypes = {path: source.dtype(path) for path in table(source.config)}
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, np.dtype(dtype)) | released_dtypes(source.config, dtype)
    kind = ReleasedSink if to == "hf" else OrbaxSink
    sink = kind(source.config, dtypes, tokenizer)
    streaming.convert(source, sink, destination, json.dumps([made_from, to, dtype]))
    return dtypes


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
      destination: one that is not there, or is empty.
      to: "orbax" or "hf".
      dtype: what parameters become; None: nothing else than they are.
      begin_as: a config that begins with the source's weights (`convert.warm`).
      verify: read the result back and hold it to the source.

    Raises:
      InputError: the source is no checkpoint, the destination exists and is not empty, the disk has no room, or
        `verify` found a difference.
    """
    source, destination = Path(source), Path(destination).resolve()
    if source.resolve() in destination.parents:
        raise InputError(f"{destination} is in {source}: name a directory outside it")
    if destination.is_mount():
        raise InputError(f"{destination} is a mount point: name a new directory in it")
    given = opened(source)
    if begin_as is not None:
        given = WarmStart(given, configs.load(begin_as))
    tokenizer = source / TOKENIZER if (source / TOKENIZER).is_file() else None
    step = given.step if isinstance(given, OrbaxCheckpoint) else None
    asked = hashlib.sha256(to_json(given.config).encode()).hexdigest()[:16]
    write(given, destination, f"{source.absolute()} {fingerprint(source, step)} {asked}", to, dtype, tokenizer)
    done = f"{source} -> {destination} ({to}): {given.config.name}, {_counted(given, to)}"
    return f"{done}; {_verified(source, given, destination, to)}" if verify else done


def _counted(source: Source, to: str) -> str:
    """How many parameters a conversion wrote, which of them the source did not hold, and which it left out."""
    specs = table(source.config)
    missing = {path for path in specs if not source.holds(path)}
    unwanted = {path for path, spec in specs.items() if to == "hf" and spec.released is None}

    def of(paths: set[str]) -> int:
        return count({path: specs[path] for path in paths})[0]

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
    folder = directory if step is None else directory / RUN / str(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [(str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def _verified(directory: Path, source: Source, destination: Path, to: str) -> str:
    """Holds a result to the source that it was made of, and its logits to those of the directory."""
    result = opened(destination)
    specs = {path: spec for path, spec in table(result.config).items() if to == "orbax" or spec.released is not None}
    said = f"verified, {streaming.verify(source, result, specs)} layers equal"
    if streaming.nbytes(specs, lambda path: np.dtype(np.float32)) > SMALL:
        return said
    from jaxtml.convert.logits import text_logits

    ids = np.random.default_rng(0).integers(0, result.config.duplex.control_base, (1, PROMPT))
    theirs, ours = (text_logits(*read(directory), ids) for directory in (directory, destination))
    apart = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
    if not np.isfinite(apart):
        raise InputError(f"the numbers are all equal, and {destination} gives logits that are no numbers")
    return f"{said}, logits of {PROMPT} tokens {f'differ by {apart:.2e} of their norm' if apart else 'too'}"
