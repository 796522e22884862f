"""`manifest.json` of a conversion: what it was made of, and CRC-32s of all it holds, to be held to them later.

A tensor's checksum, in a release, is that of its bytes in its shard, by its released name; in a checkpoint of ours,
that of one layer's part of a parameter: of its chunks in the order of `store.chunks`, each in C order. Other files are
named with theirs. Called by `convert.streaming` and `convert.inspect`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib

from jaxtml.errors import InputError

MANIFEST = "manifest.json"
CARRIED = "released"  # folder of a checkpoint of ours with the files of the release that it was made of
_WEIGHTS = (".safetensors", ".jsonl")


@dataclass(frozen=True)
class Manifest:
    """Checksums are eight hexadecimal digits."""

    source: str
    tensors: dict[str, str]
    files: dict[str, str]


def write(folder: Path, source: str, tensors: Mapping[str, str]) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    found = Manifest(source, dict(sorted(tensors.items())), files(folder))
    (folder / MANIFEST).write_text(json.dumps(asdict(found), indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """Raises `InputError` where there is none, or none that `write` wrote."""
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: what `jaxtml convert` wrote has one")
    try:
        held = Manifest(**json.loads(file.read_text()))
        if not all(isinstance(part, dict) for part in (held.tensors, held.files)):
            raise TypeError("no checksums by name")
        return held
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}") from error


def files(folder: Path) -> dict[str, str]:
    """The checksums of all files that hold no tensors."""
    found = [path for path in (*folder.glob("*"), *folder.glob(f"{CARRIED}/*")) if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in sorted(found)}
    return {
        name: f"{isal_zlib.crc32(path.read_bytes()):08x}"
        for name, path in named.items()
        if name != MANIFEST and path.suffix not in _WEIGHTS
    }


def layer_name(path: str, at: tuple[int, ...]) -> str:
    """Ours, of one layer's part of a parameter: "layers/block0/run1/attn/wq/3/0"."""
    return "/".join([path, *map(str, at)])


def crc32(values: np.ndarray, before: int = 0) -> int:
    """That of the bytes of `values` in C order, behind others of which it is `before`."""
    return isal_zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
