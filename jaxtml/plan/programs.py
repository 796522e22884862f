"""The real programs with shapes in place of arrays, for a mesh that need not be there. Called by `plan`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.config import Config
from jaxtml.data.pipeline import row_shapes
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.parallel.mesh import BATCH_AXES, MeshShape
from jaxtml.train.step import make_train_step
from jaxtml.train.storage import shapes


class Program(NamedTuple):
    """A function that `jax.jit` takes, its arguments as shapes, and which of them it may overwrite."""

    function: Any
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]


def train_program(config: Config, shape: MeshShape) -> Program:
    """One training step on the mesh that is set (`jax.set_mesh`, or an abstract one)."""
    model = InteractionModel(config, Placement(shape, config.train.transport, config.train.capacity))
    mesh = jax.sharding.get_abstract_mesh()
    init, step = make_train_step(model)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    batch = {
        name: jax.ShapeDtypeStruct((config.train.batch, *size), dtype, sharding=rows)
        for name, (size, dtype) in row_shapes(config).items()
    }
    return Program(step, (jax.eval_shape(init, shapes(model, mesh)), batch), (0,))
