"""The training step: loss by term, gradients, AdamW, and the router's correction bias, as one pure function.

Axes: B batch, T positions, D model width, V vocabulary, S own-speech positions, E experts. Called by `train.loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxtml.config import Config, FlowConfig, TrainConfig
from jaxtml.errors import InputError
from jaxtml.model.experts.routing import MODALITIES, MoEStats
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.placement import partition_specs
from jaxtml.model.spec import Params
from jaxtml.parallel.collectives import psum
from jaxtml.parallel.mesh import BATCH_AXES, TRAIN, MeshShape, axis_names
from jaxtml.stream.tokens import PositionKind, Term

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a run is: parameters, optimizer moments and the number of steps done (int32 scalar)."""

    params: Params
    moments: optax.OptState
    step: jax.Array


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, constant, then linear to zero over the last `decay` of the steps (WSD, Hu et al., 2024)."""
    falling = max(1, round(config.steps * config.decay))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, falling),
        ],
        [config.warmup, max(config.warmup, config.steps - falling)],
    )


def optimizer(config: TrainConfig, specs: dict[str, Any]) -> optax.GradientTransformation:
    """AdamW over the trained parameters, for gradients that are clipped. Norms, biases and scales do not decay; the
    vocoder has its own training."""

    def label(path: tuple[Any, ...], spec: Any) -> str:
        if path[0].key == "vocoder" or not spec.trained:
            return "frozen"
        return "matrix" if len(spec.shape) - spec.stacked > 1 else "vector"

    def adamw(decay: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(config), b1=0.9, b2=config.beta2, weight_decay=decay, mu_dtype=config.moment_dtype)

    labels = jax.tree_util.tree_map_with_path(label, specs)
    return optax.partition(
        {"matrix": adamw(config.weight_decay), "vector": adamw(0.0), "frozen": optax.set_to_zero()}, labels
    )


class TokenCounts(NamedTuple):
    """What the terms of a whole batch are divided by: positions of each kind over all devices, at least 1."""

    turns: jax.Array
    gate: jax.Array
    heard: jax.Array
    text: jax.Array
    spoken: jax.Array
    tokens: jax.Array


def count_batch(batch: Batch, mesh: MeshShape) -> TokenCounts:
    """Counts of the batch of which `batch` is this device's part."""
    kind, term = jnp.asarray(batch["kind"]), jnp.asarray(batch["term"])
    found = TokenCounts(
        turns=kind == PositionKind.TURN,
        gate=term == Term.GATE,
        heard=term == Term.HEARD,
        text=term == Term.TEXT,
        spoken=jnp.asarray(batch["speech_valid"]),
        tokens=kind != PositionKind.PAD,
    )
    return jax.tree.map(lambda mask: jnp.maximum(psum(mask.sum(), mesh, BATCH_AXES), 1), found)


def loss_fn(
    model: InteractionModel, params: Params, batch: Batch, rows: jax.Array, counts: TokenCounts
) -> tuple[jax.Array, tuple[dict[str, jax.Array], list[MoEStats]]]:
    """The share that some rows have in the loss, its terms and the MoE layers' stats: the sum of all is the whole.

    Token terms are sums of cross-entropy divided by the number of micro-turns, so that the chances at a position where
    "a word was heard" competes with "nothing happened" stay honest; the flow term is a mean over own-speech positions.

    Args:
      model: says where it runs.
      params: this device's parts.
      batch: the rows, `[B, ...]` each (see `jaxtml.data.rows.pad`).
      rows: `[B]` a key of each row's noise, so that it does not matter who works on it.
      counts: of the whole batch.
    """
    t = model.config.train
    dtype = jnp.dtype(t.compute_dtype)
    params = model.all_gather_trunk(params, dtype)
    bins = spoilt_history(batch["bins"], batch["kind"], model.config.flow, rows)
    inputs = Inputs(batch["kind"], batch["ids"], bins, batch["clock"], batch["patches"])
    embedded = model.embed(params, inputs, dtype)
    hidden, stats = model.hidden_from_embedded(params, embedded, inputs.kind, t.remat)

    nll, right = model.scores(params, hidden, batch["target"])
    terms: dict[str, jax.Array] = {}
    for name, term in (("gate", Term.GATE), ("heard", Term.HEARD), ("text", Term.TEXT)):
        chosen = batch["term"] == term
        terms[name] = jnp.where(chosen, nll, 0).sum() / counts.turns
        terms[f"{name}_right"] = (chosen & right).sum() / getattr(counts, name)

    row, slot, valid = _spoken(jnp.asarray(batch["speech_valid"]))
    spoken = hidden[row, jnp.asarray(batch["speech_at"])[row, slot]]
    target = jnp.asarray(batch["speech"])[row, slot].astype(jnp.float32)
    slots = jax.vmap(lambda r, s: jax.random.fold_in(jax.random.fold_in(rows[r], 1), s))(row, slot)
    terms["flow"] = model.bind(params).flow.loss(spoken, target, valid, slots) / counts.spoken
    terms["flow_left_out"] = jnp.asarray(batch["speech_valid"]).sum() - valid.sum(dtype=jnp.float32)
    layers = max(sum(s.z_loss.size for s in stats), 1)
    terms["router_z"] = sum((s.z_loss.sum() for s in stats), jnp.zeros(())) / (counts.tokens * layers)
    share = (
        t.gate_weight * terms["gate"]
        + t.heard_weight * terms["heard"]
        + t.text_weight * terms["text"]
        + t.flow_weight * terms["flow"]
        + t.z_loss * terms["router_z"]
    )
    if model.mtp is not None:
        terms |= _further(model, params, hidden, embedded, batch, counts)
        share = share + t.mtp_weight * terms["mtp"]
    return share, (terms, stats)


def _further(
    model: InteractionModel, params: Params, hidden: jax.Array, embedded: jax.Array, batch: Batch, counts: TokenCounts
) -> dict[str, jax.Array]:
    """The prediction heads' term: what gate, heard and text weigh for the model itself, for words further ahead, as a
    mean over heads; and the share of all words that a head has right."""
    t, heads = model.config.train, model.config.backbone.mtp_heads
    nll, right = model.mtp_scores(params, hidden, embedded, batch["target"], t.remat)
    tokens = nll.shape[2]
    beyond = jnp.pad(batch["term"], ((0, 0), (0, heads)))
    term = jnp.stack([beyond[:, later : later + tokens] for later in range(1, heads + 1)])
    weights = {Term.GATE: t.gate_weight, Term.HEARD: t.heard_weight, Term.TEXT: t.text_weight}
    lost = sum(weight * jnp.where(term == kind, nll, 0).sum() for kind, weight in weights.items())
    chosen = (term == Term.GATE) | (term == Term.HEARD) | (term == Term.TEXT)
    return {
        "mtp": lost / (counts.turns * heads),
        "mtp_right": (chosen & right).sum() / (heads * (counts.gate + counts.heard + counts.text)),
    }


def _row_keys(key: jax.Array, rows: int, mesh: MeshShape) -> jax.Array:
    """A key for each of this device's rows, by its number in the whole batch."""
    first = jnp.zeros((), jnp.int32)
    for axis in BATCH_AXES:
        first = first * mesh.sizes[axis] + (jax.lax.axis_index(axis) if mesh.devices > 1 else 0)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first * rows + jnp.arange(rows))


def _spoken(valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, slots and validity, `[B * S / 2]` each, of the own-speech slots in use: those of `valid` `[B, S]`.

    A row of little else but speech fills its slots, eight rows hardly ever half of theirs: the flow head would mostly
    work on padding. From there on, slots beyond the half are left out of the loss.
    """
    size = valid.size // 2 if len(valid) >= 8 else valid.size
    at = jnp.nonzero(valid.reshape(-1), size=size, fill_value=0)[0]
    return at // valid.shape[1], at % valid.shape[1], jnp.arange(size) < valid.sum()


def spoilt_history(bins: jax.Array, kind: jax.Array, config: FlowConfig, keys: jax.Array) -> jax.Array:
    """Own-speech frames with noise and with gaps, against exposure bias: what is fed back is never quite right.

    Each row draws one level of noise in [0, `history_noise`] bins (as CALM noises its latents, 2025) and one share of
    missing frames in [0, `history_dropout`], where 1 and more is all of them (word dropout, Bowman et al., 2016). A
    missing frame is bin 0 throughout, which no sound gives: silence is bin 2. With its history in full view a model
    continues the recordings it has learnt by heart and hardly looks at the text.

    Args:
      bins: `[B, T, 80]` uint8.
      kind: `[B, T]` uint8, `PositionKind`.
      config: the levels.
      keys: `[B]`, one of each row.

    Returns:
      `[B, T, 80]` uint8, unchanged but at OWN positions.
    """

    def row(bins: jax.Array, key: jax.Array) -> jax.Array:
        level_key, noise_key, share_key, gap_key = jax.random.split(key, 4)
        level = config.history_noise * jax.random.uniform(level_key)
        noisy = jnp.clip(jnp.round(bins + level * jax.random.normal(noise_key, bins.shape)), 0, 15)
        missing = jax.random.uniform(gap_key, bins.shape[:1]) < config.history_dropout * jax.random.uniform(share_key)
        return jnp.where(missing[:, None], 0, noisy).astype(bins.dtype)

    return jnp.where((kind == PositionKind.OWN)[..., None], jax.vmap(row)(bins, keys), bins)


def update_router_bias(params: Params, model: InteractionModel, stats: list[MoEStats], rate: float) -> Params:
    """Moves each expert's bias towards the mean load (auxiliary-loss-free balancing, Wang et al., 2024)."""
    layers = dict(params["layers"])
    remaining = iter(stats)
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


def check_batch(config: TrainConfig, mesh: MeshShape) -> None:
    """Raises `InputError` where a batch cannot be shared by the devices and their `accumulate` parts."""
    parts = mesh.batch_shards * config.accumulate
    if config.batch % parts:
        raise InputError(
            f"train.batch {config.batch} does not divide into {parts} parts, of mesh {mesh} and "
            f"train.accumulate {config.accumulate}: name another --mesh, or set another train.batch"
        )


Gradients = tuple[dict[str, jax.Array], list[MoEStats], Params]


def make_gradients(model: InteractionModel) -> Callable[[Params, Batch, jax.Array], Gradients]:
    """`(params, batch, key) -> (terms, stats, gradients)` of the whole batch; among the terms are their weighted sum
    "loss" and the norm of the gradients, "grad_norm".

    On a mesh, one program per device inside `jax.shard_map` (under `jax.set_mesh`): parameters and gradients laid out
    by `TRAIN`, the batch split over `BATCH_AXES`.
    """
    mesh = model.placement.mesh
    held = partition_specs(model.specs(), mesh, TRAIN)

    parts = model.config.train.accumulate

    def local(params: Params, batch: Batch, key: jax.Array) -> Gradients:
        rows, counts = _row_keys(key, len(batch["kind"]), mesh), count_batch(batch, mesh)

        def part(batch: Batch, rows: jax.Array) -> Any:
            return jax.value_and_grad(lambda p: loss_fn(model, p, batch, rows, counts), has_aux=True)(params)

        if parts == 1:
            (loss, (terms, stats)), grads = part(batch, rows)
        else:
            cut = jax.tree.map(lambda a: jnp.asarray(a).reshape(parts, len(a) // parts, *a.shape[1:]), (batch, rows))
            shapes = jax.eval_shape(lambda c: part(*jax.tree.map(lambda a: a[0], c)), cut)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
            sums, _ = jax.lax.scan(lambda sums, c: (jax.tree.map(jnp.add, sums, part(*c)), None), zeros, cut)
            (loss, (terms, stats)), grads = jax.tree.map(lambda a, s: a.astype(s.dtype), sums, shapes)
        terms, stats = jax.tree.map(lambda x: psum(x, mesh, BATCH_AXES), ({"loss": loss, **terms}, stats))
        grads = jax.tree.map(lambda g, spec: _summed(g, spec, mesh), grads, held)
        return {**terms, "grad_norm": _norm(grads, held, mesh)}, stats, grads

    if mesh.devices == 1:
        return local
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        local,
        in_specs=(held, rows, PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec(), held),
        check_vma=False,
    )


def _summed(grad: jax.Array, held: PartitionSpec, mesh: MeshShape) -> jax.Array:
    """A gradient summed over the batch axes on which its parameter is whole; scattered it is summed already."""
    return psum(grad, mesh, [axis for axis in BATCH_AXES if axis not in _split(held)])


def _split(held: PartitionSpec) -> tuple[str, ...]:
    """The axes over which a parameter is split."""
    return tuple(name for part in held for name in axis_names(part))


def _norm(grads: Params, held: Any, mesh: MeshShape) -> jax.Array:
    """The norm of all gradients, of which this device has a part."""
    squares: dict[tuple[str, ...], jax.Array] = {}
    for grad, spec in zip(jax.tree.leaves(grads), jax.tree.leaves(held), strict=True):
        axes = _split(spec)
        squares[axes] = squares.get(axes, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return jnp.sqrt(sum(psum(squares[axes], mesh, axes) for axes in sorted(squares)))


def make_train_step(model: InteractionModel) -> tuple[Callable[[Params], TrainState], Callable[..., Any]]:
    """`init(params) -> TrainState` and `step(state, batch) -> (state, metrics)`, both pure.

    A step whose gradient norm is not below `norm_limit` changes nothing but the counter.
    """
    config: Config = model.config
    tx = optimizer(config.train, model.specs())
    gradients = make_gradients(model)

    def init(params: Params) -> TrainState:
        return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        terms, stats, grads = gradients(state.params, batch, key)
        norm = terms["grad_norm"]
        shrink = jnp.minimum(1.0, config.train.clip_norm / norm)
        grads = jax.tree.map(lambda g: (g * shrink).astype(g.dtype), grads)
        updates, moments = tx.update(grads, state.moments, state.params)
        updated: Params = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
        params = update_router_bias(updated, model, stats, config.train.bias_rate)
        sound = norm < config.train.norm_limit  # false for NaN too
        params, moments = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (params, moments), (state.params, state.moments)
        )
        experts = config.backbone.n_experts
        load = [s.load.reshape(-1, MODALITIES, experts) for s in stats] or [jnp.zeros((0, MODALITIES, experts))]
        metrics = {
            **terms,
            "skipped": 1 - sound.astype(jnp.int32),
            "dropped": sum((s.dropped.sum() for s in stats), jnp.zeros((), jnp.int32)),
            "load": jnp.concatenate(load),
        }
        return TrainState(params, moments, state.step + 1), metrics

    return init, step
