"""The real programs with shapes in place of arrays, for a mesh that need not be there. Called by `plan`.

Axes: B rows of the global batch, T positions, C clock features, P patches, S own-speech positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.config import Config
from jaxtml.data.pipeline import speech_slots
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement, layout
from jaxtml.parallel.mesh import BATCH_AXES, TRAIN, MeshShape
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.layout import SPEECH_DIM
from jaxtml.stream.timebase import N_MELS
from jaxtml.train.step import make_train_step


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
    params = jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(
            spec.shape, config.train.param_dtype, sharding=NamedSharding(mesh, place)
        ),
        model.specs(),
        layout(model.specs(), shape, TRAIN),
    )
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    batch = {
        name: jax.ShapeDtypeStruct((config.train.batch, *size), dtype, sharding=rows)
        for name, (size, dtype) in batch_shapes(config).items()
    }
    return Program(step, (jax.eval_shape(init, params), batch), (0,))


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each array of a row (see `jaxtml.data.pipeline.pad`)."""
    tokens = config.data.tokens
    slots = speech_slots(tokens)
    patches = min(config.duplex.max_patches * config.data.turns, tokens)
    return {
        "kind": ((tokens,), jnp.uint8),
        "ids": ((tokens,), jnp.int32),
        "bins": ((tokens, N_MELS), jnp.uint8),
        "clock": ((tokens, CLOCK_FEATURES), jnp.float32),
        "patches": ((patches, 2, 40, 40, 3), jnp.float32),
        "target": ((tokens,), jnp.int32),
        "term": ((tokens,), jnp.uint8),
        "speech_at": ((slots,), jnp.int32),
        "speech": ((slots, SPEECH_DIM), jnp.float16),
        "speech_valid": ((slots,), jnp.bool_),
    }
