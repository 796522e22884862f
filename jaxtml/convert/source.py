"""Where parameters come from, whatever holds them: any part of any of them, in our layout, without the rest.

`Source` is what a conversion reads and what a run or a server starts from: a released checkpoint (`convert.released`),
one of ours (`convert.store`), a larger model that begins with a smaller one's weights (`convert.warm`). An index is a
tuple of slices, one per dimension of the parameter.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import numpy as np

from jaxtml.config import Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, ParamSpec, flatten

Index = tuple[slice, ...]

_ROWS = 64  # of a matrix that is turned at once: as many as make whole lines of a cache, few enough to stay in it


class Source(Protocol):
    """Parameters of a model of `config`."""

    config: Config

    def dtype(self, path: str) -> np.dtype:
        """What the parameter is held as."""
        ...

    def read(self, path: str, index: Index) -> np.ndarray:
        """A part of it, contiguous, as it is held. Threads may read side by side."""
        ...


class Held:
    """Parameters in memory as a `Source`."""

    def __init__(self, config: Config, params: Params):
        self.config = config
        self.leaves = {path: np.asarray(array) for path, array in flatten(params)}

    def dtype(self, path: str) -> np.dtype:
        return self.leaves[path].dtype

    def read(self, path: str, index: Index) -> np.ndarray:
        return np.ascontiguousarray(self.leaves[path][index])


def table(config: Config) -> dict[str, ParamSpec]:
    """The spec of every parameter by its path."""
    return dict(flatten(InteractionModel(config).specs()))


def whole(spec: ParamSpec) -> Index:
    return (slice(None),) * len(spec.shape)


def extent(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what an index cuts out."""
    return tuple(len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True))


def placed(source: Source, shapes: dict[str, Any]) -> Params:
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

    A matrix that lies turned is copied in strips of 64 rows: eight times as fast as NumPy's own copy, which goes
    through all of it for every column. Numbers are copied as integers: NumPy calls `ml_dtypes` for each of theirs.
    """
    if out is None:
        out = np.empty(view.shape, view.dtype)
    result, plain = out, np.dtype(f"u{view.itemsize}")
    view, out = view.view(plain), out.view(plain)
    fast = next(
        (i for i, step in enumerate(view.strides) if step == view.itemsize and view.shape[i] > 1), view.ndim - 1
    )
    last = view.ndim - 1
    if fast == last or view.shape[last] < _ROWS:
        out[...] = view
        return result
    others = [i for i in range(view.ndim) if i not in (fast, last)]
    for at in np.ndindex(*(view.shape[i] for i in others)):
        place: list[Any] = [slice(None)] * view.ndim
        for i, position in zip(others, at, strict=True):
            place[i] = position
        for start in range(0, view.shape[last], _ROWS):
            place[last] = slice(start, start + _ROWS)
            out[tuple(place)] = view[tuple(place)]
    return result


def nbytes(source: Source) -> int:
    """What all parameters take as they are held."""
    return sum(math.prod(spec.shape) * source.dtype(path).itemsize for path, spec in table(source.config).items())
