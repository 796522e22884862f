"""The chunks in which parameters are converted, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtml.checkpoint.source import Index
from jaxtml.model.spec import ParamSpec

CHUNK_BYTES = 2**23  # bytes of a file, at most


def chunk_shape(spec: ParamSpec, itemsize: int) -> tuple[int, ...]:
    """How much of a parameter one file holds: of one layer as many rows of the released tensor (experts, where it has
    them) as `CHUNK_BYTES` has room for; where one row is larger, a part of it that lies together there too. Of what is
    not released, of the longest axis."""
    inner = list(spec.shape[spec.stacked :])
    for axis in _order(spec):
        row = itemsize * math.prod(inner) // inner[axis]
        inner[axis] = _share(inner[axis], max(1, CHUNK_BYTES // row))
        if inner[axis] > 1:
            break
    return (1,) * spec.stacked + tuple(inner)


def chunk_indices(spec: ParamSpec, size: Sequence[int]) -> Iterator[Index]:
    """Every chunk of this size of a parameter, layer by layer; within one as they follow each other in the released
    tensor, whose bytes they are, one after the other."""
    order = [*range(spec.stacked), *(spec.stacked + axis for axis in _order(spec))]
    counts = [-(-whole // part) for whole, part in zip(spec.shape, size, strict=True)]
    for turned in np.ndindex(*(counts[axis] for axis in order)):
        at = [turned[order.index(axis)] for axis in range(len(order))]
        yield tuple(
            slice(i * part, min((i + 1) * part, whole)) for i, part, whole in zip(at, size, spec.shape, strict=True)
        )


def _order(spec: ParamSpec) -> Sequence[int]:
    """The axes of one layer, the first to be cut first."""
    if spec.released is not None:
        return spec.released.order
    return [int(axis) for axis in np.argsort(spec.shape[spec.stacked :])[::-1]]


def _share(n: int, at_most: int) -> int:
    """The largest divisor of `n` that is at most `at_most`; where that is less than half of it, a power of two, and the
    last share is smaller."""
    if n <= at_most:
        return n
    even = next(size for size in range(at_most, 0, -1) if n % size == 0)
    return even if 2 * even >= at_most else 1 << at_most.bit_length() - 1


@dataclass(frozen=True)
class LayerChunks:
    """One layer's part of a parameter, or all of one that is in no layer: a tensor of a release."""

    path: str
    at: tuple[int, ...]
    indices: tuple[Index, ...]

    @property
    def name(self) -> str:
        return layer_name(self.path, self.at)


def layer_chunks(specs: Mapping[str, ParamSpec], size: Callable[[str], Sequence[int]]) -> Iterator[LayerChunks]:
    """All of them, each with its chunks of the size that a parameter has, in order."""
    for path, spec in specs.items():
        found: dict[tuple[int, ...], list[Index]] = {}
        for index in chunk_indices(spec, size(path)):
            found.setdefault(tuple(cut.start for cut in index[: spec.stacked]), []).append(index)
        for at, indices in found.items():
            yield LayerChunks(path, at, tuple(indices))


def conversion_chunks(specs: Mapping[str, ParamSpec], dtype: Callable[[str], np.dtype]) -> list[LayerChunks]:
    """All of them in the chunks in which a conversion works."""
    return list(layer_chunks(specs, lambda path: chunk_shape(specs[path], dtype(path).itemsize)))


def parameter_bytes(specs: Mapping[str, ParamSpec], dtype: Callable[[str], np.dtype]) -> int:
    return sum(int(np.prod(spec.shape, dtype=np.int64)) * dtype(path).itemsize for path, spec in specs.items())


def layer_name(path: str, at: tuple[int, ...]) -> str:
    """Ours, of one layer's part of a parameter: "layers/block0/run1/attn/wq/3/0"."""
    return "/".join([path, *map(str, at)])
