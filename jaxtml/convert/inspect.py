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

from jaxtml.config import Config
from jaxtml.convert import manifest, streaming
from jaxtml.convert.checkpoint import RUN, TOKENIZER, OrbaxCheckpoint
from jaxtml.convert.command import opened
from jaxtml.convert.released import ReleasedCheckpoint
from jaxtml.convert.source import table
from jaxtml.errors import InputError
from jaxtml.model.spec import ParamSpec

_BLOCK = 2**23  # bytes that are summed at once


def described(directory: str | Path) -> tuple[Config, dict[str, ParamSpec], dict[str, Any]]:
    """The config of a checkpoint, the parameters that it holds, and `kind`, `step` (of a run; else None), `dtypes`
    (numbers of each, as held), `bytes` on disk and `uses`: what can be done with it. Raises `InputError` where it is
    none."""
    directory = Path(directory)
    source = opened(directory)
    held = {path: spec for path, spec in table(source.config).items() if source.holds(path)}
    dtypes: Counter[str] = Counter()
    for path, spec in held.items():
        dtypes[source.dtype(path).name] += math.prod(spec.shape)
    folder, step, uses = directory, None, ["logits", "convert"]
    if isinstance(source, ReleasedCheckpoint):
        formats = sorted({"NVFP4" if ".scale2" in parts else "MXFP8" for parts in source.parts.values()})
        kind = f"Inkling checkpoint{', routed experts in ' + ' and '.join(formats) if formats else ''}"
        uses += ["train --start-from"]
    else:
        assert isinstance(source, OrbaxCheckpoint)
        step = source.step
        kind = "training run" if step is not None else "jaxtml checkpoint"
        folder = directory / RUN / str(step) if step is not None else directory
        uses += ["converse"] if (directory / TOKENIZER).is_file() else []
        uses += ["train (goes on)"] if step is not None else []
        uses += ["train --start-from"]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return source.config, held, {"kind": kind, "step": step, "dtypes": dict(dtypes), "bytes": size, "uses": uses}


def checked(directory: str | Path) -> int:
    """Reads all of what a conversion wrote and holds it to the checksums in its manifest; returns how many tensors.

    Raises:
      InputError: the directory is no checkpoint or has no manifest, or tensors or files are others than were written
        (five are named).
    """
    directory = Path(directory)
    wanted, source = manifest.read(directory), opened(directory)
    parts = dict(_parts(source))
    total = streaming.nbytes(
        {path: spec for path, spec in table(source.config).items() if source.holds(path)}, source.dtype
    )
    progress = streaming.Progress(total, 0, "verified ")

    def one(name: str, stop: threading.Event) -> tuple[str, str]:
        found = 0
        for values in parts[name]():
            if stop.is_set():
                raise CancelledError
            found = manifest.crc32(values, found)
            progress.add(values.nbytes)
        return name, f"{found:08x}"

    files = manifest.files(directory)
    changed = [name for name, checksum in wanted.files.items() if files.get(name) != checksum]
    found = dict(streaming.side_by_side(one, list(parts), None))
    changed += [name for name in sorted({*found, *wanted.tensors}) if found.get(name) != wanted.tensors.get(name)]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(f"{directory} is not as it was written: {', '.join(changed[:5])}{more} differ")
    return len(found)


def _parts(source: ReleasedCheckpoint | OrbaxCheckpoint) -> Iterator[tuple[str, Callable[[], Iterator[np.ndarray]]]]:
    """What a manifest has a checksum of, as it lies there, by name."""
    if isinstance(source, ReleasedCheckpoint):
        for name, stored in source.tensors.items():
            yield name, lambda stored=stored: stored.blocks(_BLOCK)
    else:
        for layer in streaming.layers(source.specs, source.chunk_shape):
            yield layer.name, lambda layer=layer: (source.read(layer.path, index) for index in layer.indices)
