"""Safetensors as they lie on disk: headers read, tensors mapped whatever their dtype, files written piece by piece.

The library's NumPy reader knows no floats of 8 bits, and its writer wants all tensors of a file in memory. A file is 8
bytes of length, a JSON header `{name: {dtype, shape, data_offsets}}`, and the tensors, little-endian
(github.com/huggingface/safetensors). Called by `checkpoint.inkling.source`, `checkpoint.inkling.sink` and tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtml.errors import InputError

_LENGTH = 8
_LONGEST = 100 * 2**20  # of a header; the library's own limit
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: where it lies, and as what. `dtype` is the file's name for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def mapped(self) -> np.ndarray:
        """The tensor, read as it is used; none of it counts as memory of this process."""
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Its bytes, so many at a time."""
        for start in range(self.start, self.start + self.nbytes, size):
            yield np.memmap(self.file, np.uint8, "r", start, min(size, self.start + self.nbytes - start))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Raises:
      InputError: it is no safetensors file, or not all of one.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH), "little")
            if size < _LENGTH or length > min(_LONGEST, size - _LENGTH):
                raise ValueError("it is too short")
            header = json.loads(opened.read(length))
        found = {
            name: _stored(file, size, _LENGTH + length, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = _LENGTH + length
        for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
            if tensor.start != end:
                raise ValueError("its tensors overlap or leave gaps")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"{size - end} bytes follow its tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file} is not a readable safetensors file: {said}") from error
    return found


def _stored(file: Path, size: int, data: int, entry: Mapping[str, Any]) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if any(type(n) is not int for n in (first, last, *shape)) or min(shape, default=0) < 0 or type(dtype) is not str:
        raise ValueError("an entry of its header is no tensor's")
    if not 0 <= first <= last <= size - data:
        raise ValueError("it ends before its tensors do")
    if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{last - first} bytes are no {dtype} of {shape}")
    return StoredTensor(file, dtype, shape, data + first, last - first)


def create_file(file: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]]) -> dict[str, StoredTensor]:
    """A file with room for `(name, shape, dtype)` tensors, in this order, all of them zero: to be filled with
    `write_at`. One that is there already and has the same header is kept as it is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    whole = len(text).to_bytes(_LENGTH, "little") + text
    if not _begins_with(file, whole, len(whole) + end):
        with open(file, "wb") as opened:
            opened.write(whole)
            opened.truncate(len(whole) + end)
    return read_header(file)


def _begins_with(file: Path, content: bytes, size: int) -> bool:
    if not file.is_file() or file.stat().st_size != size:
        return False
    with open(file, "rb") as opened:
        return opened.read(len(content)) == content


def write_at(stored: StoredTensor, offset: int, values: np.ndarray) -> None:
    """Writes contiguous numbers `offset` bytes behind the beginning of a tensor of a file from `create`."""
    left = values.reshape(-1).view(np.uint8).data
    with open(stored.file, "r+b", buffering=0) as opened:
        opened.seek(stored.start + offset)
        while left:
            left = left[opened.write(left) :]
