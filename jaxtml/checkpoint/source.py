"""Where parameters come from, whatever holds them: any part of any of them, in our layout, without the rest.

`ParameterSource` is what a conversion reads and what a run or a server starts from: a released checkpoint
(`checkpoint.inkling.source`), one of ours (`checkpoint.orbax.source`), a larger model that begins with a smaller one's
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


def index_shape(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
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


def first_device_shapes(config: Config, dtype: str) -> dict[str, Any]:
    """Shapes of all parameters as `dtype` on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = InteractionModel(config).specs()
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype), sharding=device), specs)
