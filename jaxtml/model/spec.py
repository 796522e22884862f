"""One declaration per parameter: `ParamSpec` drives initialisation, sharding, counting, restore and conversion.

Modules declare with `param(...)` in their constructors, which puts a shape without data into the module; the table of
all specs is read back from the module tree (`specs`), so instantiating a 276B model costs nothing. Arrays live in
plain nested dicts (`{"block0": {"run0": {"attn": {"wq": array}}}}`) at every boundary.
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

_SERIAL = 2**22  # numbers up to which threads are not worth their while

Params = dict[str, Any]
Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(std: float) -> Initializer:
    return lambda rng, shape: np.float32(std) * rng.standard_normal(shape, np.float32)


def zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    del rng
    return np.zeros(shape, np.float32)


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    del rng
    return np.ones(shape, np.float32)


@dataclass(frozen=True)
class Released:
    """Where a parameter stands in a released Inkling checkpoint, and how its layout differs from ours.

    The released tensor of `shape`, seen as `view`, has its axes permuted by `axes` to give ours, and ours by `order` to
    give it back: a bijection. `name` holds `{layer}` for layer parameters.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    view: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """Our axes in the order in which the released tensor has them."""
        return tuple(self.axes.index(i) for i in range(len(self.axes))) or tuple(range(len(self.shape)))

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """Released tensor -> our layout (a view where possible)."""
        tensor = tensor.reshape(self.view or self.shape)
        return tensor.transpose(self.axes) if self.axes else tensor


def linear(name: str, d_in: int, d_out: int) -> Released:
    """A released `torch` Linear weight `[out, in]`; ours is `[in, out]`."""
    return Released(name, (d_out, d_in), (1, 0))


@dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes and initialiser of one parameter.

    Attributes:
      shape: with the stacked `(repeats, layers)` dimensions in front for layer parameters.
      axes: one logical name per dimension.
      init: `(generator, shape) -> float32 array`; `shape` is without stacked dimensions.
      released: place in the Inkling checkpoint, None for parameters of ours.
      stacked: number of leading stacked dimensions.
      trained: False for the router's correction bias, which the optimizer must not touch.
      active: share of the parameter that one token uses (experts per token / experts).
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
    """Declares a parameter: an `nnx.Param` that holds its shape and its spec, and no data."""
    spec = ParamSpec(shape, axes, init, released, 0, trained, active)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), spec=spec)


def specs(module: nnx.Module) -> dict[str, Any]:
    """The table: a nested dict of `ParamSpec` in the shape of the parameters."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = variable.get_metadata()["spec"]
    return tree


def stack_specs(tree: dict[str, Any], dims: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, Any]:
    """The same table with `dims` in front of every shape: the specs of a stack of equal layers."""

    def one(spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(
            spec, shape=dims + spec.shape, axes=axes + spec.axes, stacked=spec.stacked + len(dims)
        )

    return jax.tree.map(one, tree)


def bind(module: nnx.Module, params: Params) -> Any:
    """The module with `params` (arrays or tracers) in place of its declared shapes."""
    return nnx.merge(nnx.graphdef(module), nnx.State(params))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("block0/run0/attn/wq", leaf)` for every leaf, in the tree's order."""
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], dict):
            yield from flatten(tree[key], path)
        else:
            yield path, tree[key]


def initial_values(path: str, spec: ParamSpec, seed: int, index: tuple[slice, ...]) -> np.ndarray:
    """A part of the initial values of one parameter, float32 (see `init_params`)."""
    name = zlib.crc32(path.encode())
    streams = spec.stacked + ("expert" in spec.axes)  # the expert axis comes first in its layer
    starts = [range(*cut.indices(size)) for cut, size in zip(index, spec.shape, strict=True)]
    values = np.empty([len(span) for span in starts], np.float32)

    def draw(at: tuple[int, ...]) -> None:
        place = tuple(span[i] for span, i in zip(starts, at, strict=False))
        stream = np.random.SeedSequence((seed, name, *place))
        drawn = spec.init(np.random.Generator(np.random.Philox(stream)), spec.shape[streams:])
        values[at] = drawn[index[streams:]]

    places = np.ndindex(*values.shape[:streams])
    if values.size < _SERIAL:
        for at in places:
            draw(at)
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(draw, places))
    return values


def init_params(table: dict[str, Any], seed: int, shardings: dict[str, Any] | None = None) -> Params:
    """Initial values, float32. Every layer, and every expert of it, has a stream of random numbers of its own, which
    depends on `seed`, the parameter's path and its index alone.

    Drawn on the host: a compiled program of 150 random draws takes half a minute of XLA's time on a CPU, this 0.2 s.
    With `shardings`, a tree of the table's shape, a process makes what its own devices hold, one layer's matrix (of
    one expert) at a time, of which each device draws the whole and keeps its part.
    """

    def one(path: tuple[Any, ...], spec: ParamSpec, sharding: Any = None) -> jax.Array:
        part: Any = partial(initial_values, "/".join(str(k.key) for k in path), spec, seed)
        if sharding is None:
            return jnp.asarray(part((slice(None),) * len(spec.shape)))
        return jax.make_array_from_callback(spec.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(one, table, *(() if shardings is None else (shardings,)))


def count_parameters(table: dict[str, Any]) -> tuple[int, int]:
    """(total, active per token) number of parameters."""
    total = active = 0
    for _, spec in flatten(table):
        size = int(np.prod(spec.shape, dtype=np.int64))
        total += size
        active += round(size * spec.active)
    return total, active
