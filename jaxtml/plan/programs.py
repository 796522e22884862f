"""The real programs, with shapes in place of arrays, for a mesh that need not be present. Called by `planning`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxtml.config import Config
from jaxtml.data.rows import row_shapes
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.parallel.mesh import BATCH_AXES, MeshShape
from jaxtml.train.parameters import parameter_shapes
from jaxtml.train.step import make_train_step


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s, with or without shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


class Program(NamedTuple):
    """A program before compilation.

    Attributes:
      function: a function for `jax.jit`.
      arguments: the shapes of its arguments.
      donated: the indices of the arguments that it may overwrite.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]


def trace_program(make_program: Callable[[], Program], mesh: MeshShape) -> tuple[tuple[Any, ...], ClosedJaxpr]:
    """Traces a program for a mesh whose devices need not be known; returns its arguments and its jaxpr."""
    kind = AxisType.Explicit if mesh.devices > 1 else AxisType.Auto  # as in `make_mesh`
    axes = AbstractMesh(tuple(mesh.sizes.values()), tuple(mesh.sizes), (kind,) * len(mesh.sizes))
    with jax.sharding.use_abstract_mesh(axes):
        program = make_program()
        return program.arguments, jax.jit(program.function).trace(*program.arguments).jaxpr


def make_training_program(config: Config, shape: MeshShape) -> Program:
    """Makes one training step for the mesh that is set (by `jax.set_mesh`, or an abstract mesh)."""
    model = InteractionModel(config, Placement(shape, config.train.transport, config.train.capacity))
    mesh = jax.sharding.get_abstract_mesh()
    init, step = make_train_step(model)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    batch = {
        name: jax.ShapeDtypeStruct((config.train.batch, *size), dtype, sharding=rows)
        for name, (size, dtype) in row_shapes(config).items()
    }
    return Program(step, (jax.eval_shape(init, parameter_shapes(model, mesh)), batch), (0,))


def make_serving_program(config: Config, shape: MeshShape, platform: str) -> Program:
    """Makes one micro-turn of `serve.sessions` sessions, for the mesh that is set and its `platform`.

    Raises:
      InputError: the mesh does not divide the sessions, or a dimension of the model.
    """
    serve = config.serve
    model = InteractionModel(config, Placement(shape, serve.transport, int8=serve.int8_experts))
    duplex = Duplex(model, platform=platform)
    duplex.check_sessions(serve.sessions)
    trained = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, config.train.param_dtype), InteractionModel(config).specs()
    )
    arguments = (
        jax.eval_shape(duplex.prepare, trained),
        jax.eval_shape(lambda: duplex.init_state(serve.sessions)),
        jax.eval_shape(lambda: duplex.empty_inputs(serve.sessions)),
    )
    mesh = jax.sharding.get_abstract_mesh()
    layouts = duplex.layouts() if shape.devices > 1 else jax.tree.map(lambda _: PartitionSpec(), arguments)
    arguments = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), arguments, layouts
    )
    return Program(duplex.step, arguments, (1,))
