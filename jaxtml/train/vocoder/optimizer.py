"""The optimizer of a vocoder run: clipped AdamW with a warm-up and a cosine decay to zero."""

from __future__ import annotations

import optax


def schedule(learning_rate: float, warmup: int, steps: int) -> optax.Schedule:
    """Returns the learning rate by step of a run of `steps` steps, of which at most a tenth warm up."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(warmup, steps // 10), steps, 0.0)


def optimizer(learning_rate: float, warmup: int, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run, with the learning rate of `schedule`."""
    rate = schedule(learning_rate, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=0.01))
