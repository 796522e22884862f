"""The training step as one pure function: gradients, AdamW and the router's correction bias.

`jaxtml.train.loop` compiles and runs the step. `jaxtml.plan` compiles the step for hardware that this machine lacks.

Axes: L MoE layers, M modalities (`PositionKind`), E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtml.config import Config
from jaxtml.model.experts.routing import MODALITIES, MoEStats
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params
from jaxtml.train.gradients import make_gradients
from jaxtml.train.loss import Batch
from jaxtml.train.optimizer import optimizer
from jaxtml.train.optimizer import schedule as schedule  # its place in version 0.1: scripts import it from here

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The state of a run.

    Attributes:
      params: the master copy of the parameters.
      moments: the state of AdamW.
      step: int32 scalar, the number of steps done.
    """

    params: Params
    moments: optax.OptState
    step: jax.Array


Init = Callable[[Params], TrainState]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(model: InteractionModel) -> tuple[Init, Step]:
    """Returns `init(params) -> TrainState` and `step(state, batch) -> (state, metrics)`, both pure.

    A step whose gradient norm is not below `norm_limit` changes nothing but the counter. Metrics are the loss terms,
    "loss", "grad_norm", and:

    - "skipped": int32, 1 if the step changed nothing;
    - "dropped": int32, how often an expert was chosen but its device had no room for the token;
    - "load": `[L, M, E]`, how often each expert was chosen, by MoE layer and modality.
    """
    config: Config = model.config
    tx = optimizer(config.train, model.specs())
    gradients = make_gradients(model)

    def init(params: Params) -> TrainState:
        return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        terms, stats, grads = gradients(state.params, batch, key)
        norm = terms["grad_norm"]
        shrink = jnp.minimum(1.0, config.train.clip_norm / norm)
        grads = jax.tree.map(lambda g: (g * shrink).astype(g.dtype), grads)
        updates, moments = tx.update(grads, state.moments, state.params)
        updated: Params = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
        params = update_router_bias(updated, model, stats, config.train.bias_rate)
        usable = norm < config.train.norm_limit  # false for NaN too
        params, moments = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old), (params, moments), (state.params, state.moments)
        )
        experts = config.backbone.n_experts
        load = [s.load.reshape(-1, MODALITIES, experts) for s in stats] or [jnp.zeros((0, MODALITIES, experts))]
        metrics = {
            **terms,
            "skipped": 1 - usable.astype(jnp.int32),
            "dropped": sum((s.dropped.sum() for s in stats), jnp.zeros((), jnp.int32)),
            "load": jnp.concatenate(load),
        }
        return TrainState(params, moments, state.step + 1), metrics

    return init, step


def update_router_bias(params: Params, model: InteractionModel, stats: list[MoEStats], rate: float) -> Params:
    """Moves each expert's bias by `rate` towards the mean load (auxiliary-loss-free balancing, Wang et al., 2024)."""
    layers = dict(params["layers"])
    remaining: Iterator[MoEStats] = iter(stats)
    for b, block in enumerate(model.backbone.blocks):
        runs = dict(layers[f"block{b}"])
        for r, run in enumerate(block.runs):
            if not run.kind.is_moe:
                continue
            load = next(remaining).load.sum(axis=-2)  # over modalities
            old = runs[f"run{r}"]
            bias = old["mlp"]["router_bias"] + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
            runs[f"run{r}"] = {**old, "mlp": {**old["mlp"], "router_bias": bias}}
        layers[f"block{b}"] = runs
    return {**params, "layers": layers}
