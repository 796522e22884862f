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

import jax
import numpy as np
import psutil
from absl import logging

from jaxtml import config as configs
from jaxtml.checkpoint import manifest
from jaxtml.checkpoint.inkling.sink import ReleasedSink, released_dtypes
from jaxtml.checkpoint.inkling.source import INDEX
from jaxtml.checkpoint.manifest import CARRIED, MANIFEST
from jaxtml.checkpoint.opening import in_memory, open_checkpoint
from jaxtml.checkpoint.orbax_sink import OrbaxSink
from jaxtml.checkpoint.orbax_source import RUN, TOKENIZER, OrbaxCheckpoint
from jaxtml.checkpoint.source import ParameterSource, spec_table
from jaxtml.checkpoint.warm_start import WarmStart
from jaxtml.config import to_json
from jaxtml.convert import streaming
from jaxtml.errors import InputError
from jaxtml.model.spec import count_parameters

PROMPT = 64  # tokens of which logits are compared
ROUNDING = 1e-4  # by which those of equal numbers may differ, of their norm
CGROUP = Path("/sys/fs/cgroup")
LARGEST = 2**26  # bytes of a file that comes along
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def write(
    source: ParameterSource,
    destination: Path,
    made_from: str,
    to: str = "orbax",
    dtype: str | None = None,
    carried: Mapping[str, Path] = MappingProxyType({}),
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes all of a source (to="hf": what Inkling has) as `dtype`, None: as it is held, with the files `carried` (by
    name). What `check` raises of the folder keeps it from its name."""
    dtypes = {path: source.dtype(path) for path in spec_table(source.config)}
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, np.dtype(dtype)) | released_dtypes(source.config, dtype)
    kind = ReleasedSink if to == "hf" else OrbaxSink
    streaming.convert(source, kind(source.config, dtypes, carried), destination, made_from, check)


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
    made_from = json.dumps([str(source.resolve()), fingerprint(source, step), asked, to, dtype])
    said = [f"{source} -> {destination} ({to}): {given.config.name}, {_counted(given, to)}"]

    def check(folder: Path) -> None:
        if verify:
            said.append(_verified(held, given, open_checkpoint(folder), to))

    if verify and (destination / MANIFEST).is_file():
        if manifest.read(destination).source != made_from:
            raise InputError(f"{destination} was made of another {source} than it is now, or by another conversion")
        check(destination)
    else:
        write(given, destination, made_from, to, dtype, companions(source), check)
    return "; ".join(said)


def companions(directory: Path) -> dict[str, Path]:
    """The files of a checkpoint that are neither its weights nor made of them, by their names in a release: what
    tokenizes and prepares, model cards, licenses; of a release its `config.json` too. What is left out is logged."""
    released = any(directory.glob("*.safetensors"))
    folder = directory if released else directory / CARRIED
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    kept = [file for file in found if file.is_file() and not _is_of_weights(file)]
    left = [file.name for file in found if file not in kept and not file.name.startswith(".")]
    left = [name for name in left if not name.endswith(".safetensors") and name not in (INDEX, MANIFEST)]
    if left:
        logging.info("left out, as no part of the new checkpoint: %s", ", ".join(left))
    if not released and (directory / TOKENIZER).is_file():
        kept.append(directory / TOKENIZER)
    return {file.name: file for file in kept}


def _is_of_weights(file: Path) -> bool:
    """Whether a file beside a release's shards has weights, or says how those are numbered or quantised."""
    about = file.suffix == ".json" and "quant" in file.name
    large = file.stat().st_size > LARGEST
    return about or large or file.suffix in _WEIGHTS or file.name in (INDEX, MANIFEST) or file.name.startswith(".")


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
    folder = directory if step is None else directory / RUN / str(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [(str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def _verified(held: ParameterSource, source: ParameterSource, result: ParameterSource, to: str) -> str:
    """Holds a result to the source that it was made of, and its logits to those of the checkpoint as it was held."""
    specs = {
        path: spec for path, spec in spec_table(result.config).items() if to == "orbax" or spec.released is not None
    }
    said = f"verified, {streaming.verify(source, result, specs)} tensors equal"
    needed, free = 2 * streaming.nbytes(spec_table(source.config), lambda path: np.dtype(np.float32)), _free_memory()
    if needed > free:
        return f"{said}, logits not compared: that takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    from jaxtml.convert.logits import text_logits

    ids = np.random.default_rng(0).integers(0, result.config.duplex.control_base, (1, PROMPT))
    theirs, ours = (text_logits(*in_memory(checkpoint), ids) for checkpoint in (held, result))
    if np.array_equal(theirs, ours, equal_nan=True):
        return f"{said}, logits of {PROMPT} tokens too"
    apart = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
    before = spec_table(held.config)
    alike = held.config.backbone.global_ == result.config.backbone.global_ and all(
        path in before and held.dtype(path) == result.dtype(path) for path in specs
    )
    if not np.isfinite(apart) or (alike and apart > ROUNDING):
        raise streaming.VerificationFailed(f"all tensors are equal, and the logits differ by {apart:.2e} of their norm")
    return f"{said}, logits of {PROMPT} tokens differ by {apart:.2e} of their norm"


def _free_memory() -> int:
    """Bytes that the first device has left, the host, and the control group that this process is in."""
    held = jax.devices()[0].memory_stats() or {}
    found = [held["bytes_limit"] - held["bytes_in_use"]] if "bytes_limit" in held else []
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min([*found, psutil.virtual_memory().available])
