"""The optimizer of a training run: AdamW with a warm-up, a constant stretch and a linear decay.

Called by `jaxtml.train.step`. The vocoder is part of the parameter tree but has its own training
(`jaxtml.train.vocoder`): the optimizer leaves it alone, and the router's correction bias too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from jaxtml.config import TrainConfig
from jaxtml.model.spec import ParamSpec, SpecTable


def schedule(config: TrainConfig) -> optax.Schedule:
    """Returns the learning rate by step: a linear warm-up, a constant stretch, then a linear fall to zero.

    The fall takes the share `decay` of all steps (WSD, Hu et al., 2024).
    """
    falling = max(1, round(config.steps * config.decay))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, falling),
        ],
        [config.warmup, max(config.warmup, config.steps - falling)],
    )


def rate_at(schedule: optax.Schedule, step: int) -> float:
    """Returns the learning rate of the update that follows `step` updates."""
    return np.asarray(schedule(step)).item()


def optimizer(config: TrainConfig, specs: SpecTable) -> optax.GradientTransformation:
    """Returns AdamW over the trained parameters of a spec table, for gradients that are already clipped.

    Norms, biases and scales have no weight decay.
    """

    def label(path: tuple[Any, ...], spec: ParamSpec) -> str:
        if path[0].key == "vocoder" or not spec.trained:
            return "frozen"
        return "matrix" if len(spec.shape) - spec.stacked > 1 else "vector"

    def adamw(decay: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(config), b1=0.9, b2=config.beta2, weight_decay=decay, mu_dtype=config.moment_dtype)

    labels = jax.tree_util.tree_map_with_path(label, specs)
    return optax.partition(
        {"matrix": adamw(config.weight_decay), "vector": adamw(0.0), "frozen": optax.set_to_zero()}, labels
    )
