"""Safetensors files: reads their headers, maps their tensors, and writes new files piece by piece.

The `safetensors` library is not enough here: its NumPy reader knows no floats of 8 bits, and its writer wants all
tensors of a file in memory. A file is 8 bytes with the length of the header, a JSON header
`{name: {dtype, shape, data_offsets}}`, and the tensors in little-endian order (github.com/huggingface/safetensors).

Called by the other modules of `checkpoint.inkling` and by tests.
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

from jaxtml.checkpoint.files import check_not_pointer
from jaxtml.errors import InputError
from jaxtml.strict_json import dumps

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
# Dtypes in the order in which the library writes them: by the size of an element, then by its list of dtypes.
_LIBRARY_ORDER = ("I64", "F32", "I32", "BF16", "F16", "F8_E8M0", "F8_E4M3", "U8")
_LENGTH_BYTES = 8  # a file begins with the length of its header, a number of 8 bytes
_LONGEST_HEADER = 100 * 2**20  # bytes; the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored.

    Attributes:
      file: the safetensors file.
      dtype: the file's name for the dtype: a key of `DTYPES`, if it is known here.
      shape: the shape of the tensor.
      start: the offset of the tensor in the file in bytes.
      nbytes: the size of the tensor in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def mapped(self) -> np.ndarray:
        """Maps the tensor into memory. It is read when it is used, and does not count as memory of this process."""
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yields the bytes of the tensor, mapped, in blocks of at most `size` bytes."""
        end = self.start + self.nbytes
        for start in range(self.start, end, size):
            yield np.memmap(self.file, np.uint8, "r", start, min(size, end - start))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file by name.

    Raises:
      InputError: the file is missing, is damaged, or is no safetensors file.
    """
    if file.is_symlink() and not file.exists():
        raise InputError(f"{file} is a link to a file that is missing, {file.readlink()}: download it again")
    if file.is_file():
        check_not_pointer(file)
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_LONGEST_HEADER, size - _LENGTH_BYTES):
                raise ValueError("its header does not fit into the file, or is too long")
            header = json.loads(opened.read(length))
        start = _LENGTH_BYTES + length
        tensors = {
            name: _parse_entry(file, size, start, entry) for name, entry in header.items() if name != "__metadata__"
        }
        _check_that_tensors_fill(tensors.values(), start, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file} is not a readable safetensors file, download it again: {cause}") from error
    return tensors


def _parse_entry(file: Path, size: int, start: int, entry: Mapping[str, Any]) -> StoredTensor:
    """Returns the tensor of one entry of a header. `start` is the offset in the file of the first tensor."""
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if any(type(n) is not int for n in (begin, end, *shape)) or min(shape, default=0) < 0 or type(dtype) is not str:
        raise ValueError("an entry of its header does not describe a tensor")
    if not 0 <= begin <= end <= size - start:
        raise ValueError("it ends before its tensors do")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"a tensor {dtype} of {shape} cannot have {end - begin} bytes")
    return StoredTensor(file, dtype, shape, start + begin, end - begin)


def _check_that_tensors_fill(tensors: Iterable[StoredTensor], start: int, size: int) -> None:
    """Raises `ValueError` unless the tensors follow each other without gaps from `start` to the end of the file."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{size - end} bytes follow its tensors")


def read_header_text(file: Path) -> str:
    """Returns the header of a file that `read_header` reads, with its padding."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        return opened.read(length).decode()


def dtype_name(dtype: np.dtype) -> str:
    """Returns the name of a dtype in safetensors files, for example "BF16"."""
    return _NAMES[np.dtype(dtype)]


def header_text(tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]]) -> str:
    """Returns the header that the `safetensors` library writes for tensors `(name, shape, dtype)`, to the byte.

    The library puts tensors of wide elements first, so that each is aligned, and sorts tensors of one dtype by name.
    The metadata in the header is that of a file from `transformers`.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    named = [(name, shape, dtype_name(dtype)) for name, shape, dtype in tensors]
    for name, shape, dtype in sorted(named, key=lambda tensor: (_LIBRARY_ORDER.index(tensor[2]), tensor[0])):
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % _LENGTH_BYTES)


def create_file(file: Path, header: str) -> dict[str, StoredTensor]:
    """Makes a file of zeros with a header from `header_text` or `read_header_text`, to be filled with `write_at`.

    Keeps a file that is there already and has the same header.
    """
    text = header.encode()
    entries = json.loads(text)
    end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    content = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    if not _begins_with(file, content, len(content) + end):
        with open(file, "wb") as opened:
            opened.write(content)
            opened.truncate(len(content) + end)
    return read_header(file)


def _begins_with(file: Path, content: bytes, size: int) -> bool:
    """Returns whether there is a file of `size` bytes that begins with `content`."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    with open(file, "rb") as opened:
        return opened.read(len(content)) == content


def write_at(stored: StoredTensor, offset: int, values: np.ndarray) -> None:
    """Writes contiguous values into a tensor of a file from `create_file`, `offset` bytes after the tensor's start."""
    left = values.reshape(-1).view(np.uint8).data
    with open(stored.file, "r+b", buffering=0) as opened:
        opened.seek(stored.start + offset)
        while left:
            left = left[opened.write(left) :]
