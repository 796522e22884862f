"""`manifest.json` of a conversion: what it was made of, and all that it holds, to be held to it later.

A tensor has its dtype, its shape and a CRC-32: in a release, of its bytes in its shard, by its released name; in a
checkpoint of ours, of one layer's part of a parameter: of its chunks in the order of `store.chunks`, each in C order.
Other files have a CRC-32 too. Called by `convert.streaming` and `convert.inspection`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib

from jaxtml.checkpoint.files import MANIFEST, RELEASE_FILES
from jaxtml.errors import InputError

_VERSION = 1
_TENSORS = (".safetensors", ".jsonl")


@dataclass(frozen=True)
class TensorRecord:
    """`crc32` is eight hexadecimal digits."""

    dtype: str
    shape: tuple[int, ...]
    crc32: str

    @classmethod
    def of(cls, dtype: str, shape: Sequence[int], crc32: int) -> TensorRecord:
        return cls(dtype, tuple(shape), f"{crc32:08x}")


@dataclass(frozen=True)
class Manifest:
    """`files` is the checksums of all files but those of tensors."""

    source: str
    tensors: dict[str, TensorRecord]
    files: dict[str, str]


def write_manifest(folder: Path, source: str, tensors: Mapping[str, TensorRecord]) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    beside = [path for path in (*folder.glob("*"), *folder.glob(f"{RELEASE_FILES}/*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in sorted(beside) if path.suffix not in _TENSORS]
    found = Manifest(source, dict(sorted(tensors.items())), file_checksums(folder, names))
    (folder / MANIFEST).write_text(json.dumps({"version": _VERSION, **asdict(found)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises `InputError` where there is none, or none that `write` wrote."""
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: what `jaxtml convert` wrote has one")
    try:
        held = json.loads(file.read_text())
        if held["version"] != _VERSION:
            raise InputError(f"{file} is of another version than this jaxtml writes: convert again")
        tensors = {name: TensorRecord(**one | {"shape": tuple(one["shape"])}) for name, one in held["tensors"].items()}
        return Manifest(str(held["source"]), tensors, dict(held["files"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is none that `jaxtml convert` wrote") from error


def file_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Those of the files that are there."""
    found = {name: folder / name for name in names}
    return {name: f"{isal_zlib.crc32(file.read_bytes()):08x}" for name, file in found.items() if file.is_file()}


def crc32(values: np.ndarray, before: int = 0) -> int:
    """That of the bytes of `values` in C order, behind others of which it is `before`."""
    return isal_zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
