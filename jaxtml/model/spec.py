"""One declaration per parameter: a `ParamSpec` drives initialisation, sharding, counting, restore and conversion.

Called by every module of the model, and by all code that reads, writes, places or counts parameters. A module declares
its parameters with `param(...)` in its constructor. `param` puts a shape without data into the module, and `specs`
reads the table of all `ParamSpec`s back from the module tree: declaring a model of 276B parameters costs nothing. At
every boundary, arrays live in plain nested dicts such as `{"block0": {"run0": {"attn": {"wq": array}}}}`.

Stacked dimensions come first in a shape: `[repeats, layers, ...]` for layer parameters (`jaxtml.model.stack`).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_MAX_SERIAL = 2**22  # numbers; up to here, starting threads costs more than they save

Params = dict[str, Any]  # a nested dict of arrays
SpecTable = dict[str, Any]  # a nested dict of `ParamSpec`s, in the shape of the parameters
Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(std: float) -> Initializer:
    """Returns an initialiser that draws from a normal distribution with mean 0."""
    return lambda rng, shape: np.float32(std) * rng.standard_normal(shape, np.float32)


def zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An initialiser: all zeros."""
    del rng
    return np.zeros(shape, np.float32)


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An initialiser: all ones."""
    del rng
    return np.ones(shape, np.float32)


@dataclass(frozen=True)
class Released:
    """Where a parameter stands in a released Inkling checkpoint, and how its layout there differs from ours.

    The released tensor is reshaped to `view`, then its axes are permuted by `axes`: this gives our layout. Permuting
    ours by `order` gives the released layout back, so the mapping is a bijection.

    Attributes:
      name: the released tensor's name; the name of a layer parameter contains `{layer}`.
      shape: the released tensor's shape.
      axes: for each of our axes, its index in the view; empty: the same order.
      view: the shape in which the released tensor is seen; empty: `shape`.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    view: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings our axes into the order of the released tensor."""
        return tuple(self.axes.index(i) for i in range(len(self.axes))) or tuple(range(len(self.shape)))

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """Converts the released tensor to our layout, without a copy where possible."""
        tensor = tensor.reshape(self.view or self.shape)
        return tensor.transpose(self.axes) if self.axes else tensor


def linear(name: str, d_in: int, d_out: int) -> Released:
    """Returns the place of a released `torch` Linear weight `[out, in]`; ours is `[in, out]`."""
    return Released(name, (d_out, d_in), (1, 0))


@dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter.

    Attributes:
      shape: for a layer parameter, with the stacked dimensions `(repeats, layers)` in front.
      axes: one logical name per dimension; `jaxtml.parallel.mesh` has a sharding rule for each name.
      init: `(generator, shape) -> float32 array`; its `shape` is without the stacked dimensions.
      released: the place in a released Inkling checkpoint; None for a parameter that Inkling does not have.
      stacked: the number of stacked dimensions in front.
      trained: False for the router's correction bias, which the optimizer must not touch.
      active: the share of the parameter that one token uses, for example experts per token / experts.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    released: Released | None = None
    stacked: int = 0
    trained: bool = True
    active: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{len(self.axes)} axes {self.axes} for shape {self.shape}")


def param(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Initializer,
    *,
    released: Released | None = None,
    trained: bool = True,
    active: float = 1.0,
) -> nnx.Param:
    """Declares a parameter: returns an `nnx.Param` that holds a float32 shape and a `ParamSpec`, and no data.

    The arguments are the attributes of `ParamSpec`.
    """
    spec = ParamSpec(shape, axes, init, released, 0, trained, active)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), spec=spec)


def specs(module: nnx.Module) -> SpecTable:
    """Returns the spec table of a module."""
    tree: SpecTable = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = variable.get_metadata()["spec"]
    return tree


def stack_specs(table: SpecTable, dims: tuple[int, ...], axes: tuple[str, ...]) -> SpecTable:
    """Returns the table of a stack of equal layers: `dims` in front of every shape, `axes` in front of its axes."""

    def stack_spec(spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(
            spec, shape=dims + spec.shape, axes=axes + spec.axes, stacked=spec.stacked + len(dims)
        )

    return jax.tree.map(stack_spec, table)


def bind(module: nnx.Module, params: Params) -> Any:
    """Returns a copy of the module that holds `params` (arrays or tracers) in place of its declared shapes."""
    return nnx.merge(nnx.graphdef(module), nnx.State(params))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields a pair such as `("block0/run0/attn/wq", leaf)` for every leaf, in the order of the sorted keys."""
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], dict):
            yield from flatten(tree[key], path)
        else:
            yield path, tree[key]


def initial_values(path: str, spec: ParamSpec, seed: int, index: tuple[slice, ...]) -> np.ndarray:
    """Returns a part of the initial values of one parameter, float32 (see `init_params`).

    Args:
      path: the parameter's path, such as "layers/block0/run0/attn/wq".
      spec: the parameter's declaration.
      seed: the seed of all parameters.
      index: which part, one slice per dimension.
    """
    path_hash = zlib.crc32(path.encode())
    # Each index of these leading dimensions has a random stream of its own; the expert axis comes first in its layer.
    leading = spec.stacked + ("expert" in spec.axes)
    spans = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    values = np.empty([len(span) for span in spans], np.float32)

    def draw(position: tuple[int, ...]) -> None:
        in_parameter = tuple(span[i] for span, i in zip(spans, position, strict=False))
        stream = np.random.SeedSequence((seed, path_hash, *in_parameter))
        drawn = spec.init(np.random.Generator(np.random.Philox(stream)), spec.shape[leading:])
        values[position] = drawn[index[leading:]]

    positions = np.ndindex(*values.shape[:leading])
    if values.size < _MAX_SERIAL:
        for position in positions:
            draw(position)
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(draw, positions))
    return values


def init_params(table: SpecTable, seed: int, shardings: dict[str, Any] | None = None) -> Params:
    """Returns the initial values of all parameters, float32.

    Every layer, and every expert of a layer, has a random stream of its own. The stream depends only on `seed`, the
    parameter's path, and the index of layer and expert. The values are drawn on the host. For the 157 parameters of the
    config `tiny` this takes 0.2 s. XLA on a CPU needs half a minute to compile a program of 150 random draws.

    Args:
      table: the declarations.
      seed: an integer from 0 on.
      shardings: a tree in the shape of `table`; None: every array is complete on the default device. With shardings,
        a process makes only what its own devices hold. It works through one matrix of one layer (and expert) at a
        time: for each device it draws the complete matrix and keeps the device's part.
    """

    def init_param(path: tuple[Any, ...], spec: ParamSpec, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
        part: Any = partial(initial_values, "/".join(str(k.key) for k in path), spec, seed)
        if sharding is None:
            return jnp.asarray(part((slice(None),) * len(spec.shape)))
        return jax.make_array_from_callback(spec.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(init_param, table, *(() if shardings is None else (shardings,)))


def count_parameters(table: SpecTable) -> tuple[int, int]:
    """Returns how many parameters there are, and how many of them one token uses: (total, active)."""
    total = active = 0
    for _, spec in flatten(table):
        size = int(np.prod(spec.shape, dtype=np.int64))
        total += size
        active += round(size * spec.active)
    return total, active
