"""`manifest.json` of a converted checkpoint: what the checkpoint was made from, and a record of all that it holds.

The manifest has dtype, shape and CRC-32 of each tensor, and the CRC-32 of each other file. So `jaxtml info --verify`
can tell later whether anything has changed (`convert.inspection`). The conversion writes it (`convert.streaming`).

- In a released checkpoint, a tensor has its released name. Its CRC-32 is that of its bytes in the shard.
- In a jaxtml checkpoint, a tensor is one layer's part of a parameter (`checkpoint.chunks.layer_name`). Its CRC-32 is
  that of its chunks in the order of `checkpoint.chunks.chunk_indices`, each in C order.
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
from jaxtml.strict_json import dumps

_VERSION = 1
# Files whose checksums are not recorded. Each tensor of a .safetensors file has a checksum of its own instead. The
# journal of the conversion, a .jsonl file, is removed at the end.
_UNRECORDED_SUFFIXES = (".safetensors", ".jsonl")


@dataclass(frozen=True)
class TensorRecord:
    """The manifest's record of one tensor. `crc32` is eight hexadecimal digits."""

    dtype: str
    shape: tuple[int, ...]
    crc32: str

    @classmethod
    def create(cls, dtype: str, shape: Sequence[int], crc32: int) -> TensorRecord:
        return cls(dtype, tuple(shape), f"{crc32:08x}")


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
      source: identifies what the checkpoint was made from, and how.
      tensors: the record of each tensor by its name.
      files: the CRC-32 of each file that holds no tensors, as eight hexadecimal digits.
    """

    source: str
    tensors: dict[str, TensorRecord]
    files: dict[str, str]


def write_manifest(folder: Path, source: str, tensors: Mapping[str, TensorRecord]) -> None:
    """Writes the manifest of the checkpoint in `folder`, with checksums of the files that are there now."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = [path for path in (*folder.glob("*"), *folder.glob(f"{RELEASE_FILES}/*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in sorted(files) if path.suffix not in _UNRECORDED_SUFFIXES]
    manifest = Manifest(source, dict(sorted(tensors.items())), file_checksums(folder, names))
    (folder / MANIFEST).write_text(dumps({"version": _VERSION, **asdict(manifest)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of the checkpoint in `folder`.

    Raises:
      InputError: the checkpoint has no manifest, or `write_manifest` did not write it.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{folder} has no {MANIFEST}, which only `jaxtml convert` writes: `jaxtml convert {folder} DST --verify` "
            "makes a checkpoint that can be verified"
        )
    try:
        fields = json.loads(file.read_text())
        if fields["version"] != _VERSION:
            raise InputError(f"{file} was written by another version of jaxtml: convert the checkpoint again")
        tensors = {
            name: TensorRecord(**record | {"shape": tuple(record["shape"])})
            for name, record in fields["tensors"].items()
        }
        return Manifest(str(fields["source"]), tensors, dict(fields["files"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is not a manifest that `jaxtml convert` wrote: convert again") from error


def file_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the CRC-32 of each file of `folder` by its name. Files that are missing are left out."""
    files = {name: folder / name for name in names}
    return {name: f"{isal_zlib.crc32(file.read_bytes()):08x}" for name, file in files.items() if file.is_file()}


def crc32(values: np.ndarray, before: int = 0) -> int:
    """Returns the CRC-32 of the bytes of `values` in C order. `before` is the CRC-32 of the bytes that precede them."""
    return isal_zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
