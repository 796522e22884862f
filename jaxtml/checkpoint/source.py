"""Where parameters come from: the `ParameterSource` protocol, and how parameters get from a source onto devices.

A conversion reads from a source, and a training run or a server starts from one. The sources are a released Inkling
checkpoint (`checkpoint.inkling.source`), a jaxtml checkpoint (`checkpoint.orbax.source`), a larger model that starts
with the weights of a smaller one (`checkpoint.warm_start`), and parameters in memory (`InMemorySource`).

A source gives any part of any parameter in our layout without reading the rest. The path of a parameter is its place in
the tree of parameters, for example "layers/block0/run1/attn/wq".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import jax
import numpy as np

from jaxtml.config import Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, ParamSpec, flatten

Index = tuple[slice, ...]
"""A part of a parameter: one slice for each of its dimensions."""

Position = tuple[int, ...]
"""A layer's index in the stacked dimensions of a parameter: `(repeat, layer)`.

A parameter that belongs to layers stacks the values of all layers of a run. A run is a number of equal layers in a row,
and belongs to a block of layers that the model may repeat (`model.stack`). `repeat` is the number of the repeat of the
block, and `layer` is the number of the layer in its run. In any other parameter the position is `()`.
"""


class ParameterSource(Protocol):
    """The parameters of a model whose config is `config`."""

    config: Config

    def dtype(self, path: str) -> np.dtype:
        """Returns the dtype in which `read` gives the parameter."""
        ...

    def holds(self, path: str) -> bool:
        """Returns whether the source has the parameter. If not, `read` draws the initial values of a new model."""
        ...

    def read(self, path: str, index: Index) -> np.ndarray:
        """Returns a part of a parameter, contiguous in memory. Several threads may read at the same time."""
        ...


class InMemorySource:
    """A `ParameterSource` of parameters that are in memory."""

    def __init__(self, config: Config, params: Params):
        self.config = config
        self.arrays = {path: np.asarray(array) for path, array in flatten(params)}

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def holds(self, path: str) -> bool:
        return True

    def read(self, path: str, index: Index) -> np.ndarray:
        return np.ascontiguousarray(self.arrays[path][index])


def spec_table(config: Config) -> dict[str, ParamSpec]:
    """Returns the spec of every parameter of a model by its path."""
    return dict(_spec_table(config))


@lru_cache(maxsize=16)
def _spec_table(config: Config) -> Mapping[str, ParamSpec]:
    """Makes `spec_table`. Building a small model takes 0.1 s, and a conversion asks for the table five times."""
    return dict(flatten(InteractionModel(config).specs()))


def full_index(spec: ParamSpec) -> Index:
    """Returns the index of the whole parameter."""
    return (slice(None),) * len(spec.shape)


def index_shape(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the part that `index` cuts out of an array of `shape`."""
    return tuple(len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True))


def place_parameters(source: ParameterSource, shapes: dict[str, Any]) -> Params:
    """Reads all parameters onto devices. Each process reads the parts of its own devices and nothing else.

    Args:
      source: the source to read from.
      shapes: the tree of parameters with a `jax.ShapeDtypeStruct` for each: its dtype and sharding are those of the
        result.
    """

    def place(keys: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        path = "/".join(str(key.key) for key in keys)

        def read_part(index: Index | None) -> np.ndarray:
            return source.read(path, index or (slice(None),) * len(shape.shape)).astype(shape.dtype, copy=False)

        return jax.make_array_from_callback(shape.shape, shape.sharding, read_part)

    return jax.tree_util.tree_map_with_path(place, shapes)


def read_parameters(source: ParameterSource, dtype: str = "float32") -> Params:
    """Reads all parameters onto the first device as `dtype`."""
    return place_parameters(source, first_device_shapes(source.config, dtype))


def first_device_shapes(config: Config, dtype: str) -> dict[str, Any]:
    """Returns the tree of parameters with a `jax.ShapeDtypeStruct` for each, as `dtype` on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = InteractionModel(config).specs()
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype), sharding=device), specs)
