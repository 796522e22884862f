"""Where parameters come from, whatever holds them: any part of any of them, in our layout, without the rest.

`ParameterSource` is what a conversion reads and what a run or a server starts from: a released checkpoint
(`checkpoint.inkling.source`), one of ours (`checkpoint.orbax_source`), a larger model that begins with a smaller one's
weights (`checkpoint.warm_start`). An index is a tuple of slices, one per dimension of the parameter.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from jaxtml.config import Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, ParamSpec, flatten

Index = tuple[slice, ...]

# Blocks in which a matrix is turned: less than half a megabyte, which a core's second cache holds.
_BLOCK_ROWS, _BLOCK_BYTES, _PADDING = 512, 768, 8
_SMALLEST = 32  # sides of matrices that are not worth a buffer


class ParameterSource(Protocol):
    """Parameters of a model of `config`."""

    config: Config

    def dtype(self, path: str) -> np.dtype:
        """What the parameter is held as."""
        ...

    def holds(self, path: str) -> bool:
        """Whether it is here; if not, `read` draws it as for a new model."""
        ...

    def read(self, path: str, index: Index) -> np.ndarray:
        """A part of it, contiguous, as it is held. Threads may read side by side."""
        ...


class InMemorySource:
    """Parameters in memory as a `ParameterSource`."""

    def __init__(self, config: Config, params: Params):
        self.config = config
        self.leaves = {path: np.asarray(array) for path, array in flatten(params)}

    def dtype(self, path: str) -> np.dtype:
        return self.leaves[path].dtype

    def holds(self, path: str) -> bool:
        return True

    def read(self, path: str, index: Index) -> np.ndarray:
        return np.ascontiguousarray(self.leaves[path][index])


def spec_table(config: Config) -> dict[str, ParamSpec]:
    """The spec of every parameter by its path."""
    return dict(flatten(InteractionModel(config).specs()))


def full_index(spec: ParamSpec) -> Index:
    return (slice(None),) * len(spec.shape)


def extent(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what an index cuts out."""
    return tuple(len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True))


def place_parameters(source: ParameterSource, shapes: dict[str, Any]) -> Params:
    """The parameters where and as `shapes`, a tree of `jax.ShapeDtypeStruct`s with shardings, says: each process reads
    what its own devices hold."""

    def one(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(str(key.key) for key in path)

        def part(index: Index | None) -> np.ndarray:
            return source.read(name, index or (slice(None),) * len(shape.shape)).astype(shape.dtype, copy=False)

        return jax.make_array_from_callback(shape.shape, shape.sharding, part)

    return jax.tree_util.tree_map_with_path(one, shapes)


def contiguous(view: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`view` copied to `out` (None: a new array) in its own order of axes.

    A matrix that lies turned is copied block by block through a buffer whose rows are not a power of two apart: NumPy's
    own copy goes to lines of a cache that all belong in the same few places of it, and takes three to eight times as
    long. Numbers are copied as integers: NumPy calls `ml_dtypes` for each of theirs.
    """
    if out is None:
        out = np.empty(view.shape, view.dtype)
    if out.dtype != view.dtype:
        raise TypeError(f"{view.dtype} is not {out.dtype}: numbers are copied as they are")
    result, plain = out, np.dtype(f"u{view.itemsize}")
    view, out = view.view(plain), out.view(plain)
    fast = next(
        (i for i, step in enumerate(view.strides) if step == view.itemsize and view.shape[i] > 1), view.ndim - 1
    )
    last = view.ndim - 1
    if fast == last or min(view.shape[fast], view.shape[last]) < _SMALLEST:
        out[...] = view
        return result
    width = _BLOCK_BYTES // view.itemsize
    buffer = np.empty((_BLOCK_ROWS, width + _PADDING), plain)
    others = [i for i in range(view.ndim) if i not in (fast, last)]
    order = (*others, last, fast)
    view, out = view.transpose(order), out.transpose(order)
    for at in np.ndindex(view.shape[: len(others)]):
        matrix, turned = view[at], out[at]
        for row in range(0, matrix.shape[0], _BLOCK_ROWS):
            for column in range(0, matrix.shape[1], width):
                block = np.s_[row : row + _BLOCK_ROWS, column : column + width]
                part = matrix[block]
                held = buffer[: part.shape[0], : part.shape[1]]
                held[...] = part
                turned[block] = held
    return result
