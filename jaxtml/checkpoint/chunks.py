"""Cuts parameters into chunks: the parts that a conversion reads, writes and notes as done.

In a jaxtml checkpoint that `jaxtml convert` wrote, each chunk is one file. An Inkling checkpoint has one tensor for
each layer of a parameter, the layer's released tensor. The chunks of a layer come in the order of their bytes in this
tensor.

Called by `jaxtml.convert` and `checkpoint.orbax.sink`. Before you change how parameters are cut, note that two things
depend on the order and number of chunks: where an interrupted conversion resumes, and the checksums in a manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtml.checkpoint.source import Index, Position
from jaxtml.model.spec import ParamSpec

CHUNK_BYTES = 2**23  # the largest size of a chunk


@dataclass(frozen=True)
class LayerChunks:
    """The chunks of one layer's part of a parameter, in order.

    Together they are one released tensor, unless the parameter is one that Inkling checkpoints lack.

    Attributes:
      path: the path of the parameter.
      position: the position of the layer in the parameter.
      indices: the index of each chunk in the parameter.
    """

    path: str
    position: Position
    indices: tuple[Index, ...]

    @property
    def name(self) -> str:
        return layer_name(self.path, self.position)


def layer_name(path: str, position: Position) -> str:
    """Returns our name for one layer's part of a parameter, for example "layers/block0/run1/attn/wq/3/0"."""
    return "/".join([path, *map(str, position)])


def chunk_shape(spec: ParamSpec, itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the chunks of a parameter whose elements have `itemsize` bytes.

    A chunk is a part of one layer: as many rows of the released tensor as fit into `CHUNK_BYTES`. The rows of a tensor
    of experts are whole experts. If one row does not fit, a chunk is a part of a row. In both cases the bytes of a
    chunk lie together in the released tensor. A parameter that Inkling checkpoints lack is cut along its longest axis.
    """
    inner = list(spec.shape[spec.stacked :])
    for axis in _cut_order(spec):
        row_bytes = itemsize * math.prod(inner) // inner[axis]
        inner[axis] = _cut_length(inner[axis], max(1, CHUNK_BYTES // row_bytes))
        if inner[axis] > 1:
            break
    return (1,) * spec.stacked + tuple(inner)


def chunk_indices(spec: ParamSpec, shape: Sequence[int]) -> Iterator[Index]:
    """Yields the index of every chunk of `shape` in a parameter, layer by layer.

    Within a layer, the chunks follow each other as their bytes do in the released tensor.
    """
    order = [*range(spec.stacked), *(spec.stacked + axis for axis in _cut_order(spec))]
    counts = [-(-size // length) for size, length in zip(spec.shape, shape, strict=True)]
    for ordered in np.ndindex(*(counts[axis] for axis in order)):
        chunk = [ordered[order.index(axis)] for axis in range(len(order))]
        yield tuple(
            slice(i * length, min((i + 1) * length, size))
            for i, length, size in zip(chunk, shape, spec.shape, strict=True)
        )


def layer_chunks(specs: Mapping[str, ParamSpec], shape: Callable[[str], Sequence[int]]) -> Iterator[LayerChunks]:
    """Yields the chunks of every layer of every parameter. `shape(path)` is the shape of a parameter's chunks."""
    for path, spec in specs.items():
        layers: dict[Position, list[Index]] = {}
        for index in chunk_indices(spec, shape(path)):
            layers.setdefault(tuple(cut.start for cut in index[: spec.stacked]), []).append(index)
        for position, indices in layers.items():
            yield LayerChunks(path, position, tuple(indices))


def conversion_chunks(specs: Mapping[str, ParamSpec], dtype: Callable[[str], np.dtype]) -> list[LayerChunks]:
    """Returns the chunks in which a conversion writes parameters. `dtype(path)` is the dtype that it writes."""
    return list(layer_chunks(specs, lambda path: chunk_shape(specs[path], dtype(path).itemsize)))


def parameter_bytes(specs: Mapping[str, ParamSpec], dtype: Callable[[str], np.dtype]) -> int:
    """Returns the size of all parameters in bytes. `dtype(path)` is the dtype of a parameter."""
    return sum(int(np.prod(spec.shape, dtype=np.int64)) * dtype(path).itemsize for path, spec in specs.items())


def _cut_order(spec: ParamSpec) -> Sequence[int]:
    """Returns the axes of one layer's part of a parameter in the order in which they are cut."""
    if spec.released is not None:
        return spec.released.order
    return [int(axis) for axis in np.argsort(spec.shape[spec.stacked :])[::-1]]


def _cut_length(size: int, at_most: int) -> int:
    """Returns the length, at most `at_most`, into which an axis of `size` is cut.

    The length is the largest divisor of `size` that is at most `at_most`. If this divisor is less than half of
    `at_most`, the length is instead the largest power of two that is at most `at_most`, and the last part is shorter.
    """
    if size <= at_most:
        return size
    divisor = next(length for length in range(at_most, 0, -1) if size % length == 0)
    return divisor if 2 * divisor >= at_most else 1 << at_most.bit_length() - 1
