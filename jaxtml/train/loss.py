"""The loss of a training step, term by term, for one device's rows.

Each device computes its rows' share of the loss; the sum over devices (`jaxtml.train.gradients`) is the loss of the
batch. Sums are therefore divided by counts over the whole batch, not by counts over the device's rows.

A position of the model's own speech is an own-speech position. Every row has the same number of places for them, its
own-speech slots. A row with fewer own-speech positions leaves its last slots unused (`jaxtml.data.rows`).

Axes: B rows of this device, T positions, D model width, S own-speech slots of a row, H prediction heads, N own-speech
slots of all rows that the flow head works on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtml.model.experts.routing import MoEStats
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.spec import Params
from jaxtml.model.speech.flow import normalise
from jaxtml.parallel.collectives import psum
from jaxtml.parallel.mesh import BATCH_AXES, MeshShape
from jaxtml.stream.dmel import SILENT_MELS
from jaxtml.stream.tokens import PositionKind, Term
from jaxtml.train.history import corrupt_frames, corrupt_history

Batch = dict[str, jax.Array]
Terms = dict[str, jax.Array]

TEXT_TERMS = (("gate", Term.GATE), ("heard", Term.HEARD), ("text", Term.TEXT))
# Adam's steps hardly depend on the scale of a loss. The drafter's loss is large, and all gradients are clipped by their
# common norm. A small weight keeps the drafter from shrinking the steps of the model.
DRAFT_WEIGHT = 0.01
# In each row, the drafter learns on at most one position in this many. Generated conversations have text at fewer.
_POSITIONS_PER_DRAFT = 8
# From this many rows on, the flow head works on half of the own-speech slots, see `_used_slots`.
MANY_ROWS = 8


class PositionCounts(NamedTuple):
    """How many positions of each kind the whole batch has, over all devices; int32 scalars, at least 1."""

    micro_turns: jax.Array
    gate: jax.Array
    heard: jax.Array
    text: jax.Array
    spoken: jax.Array
    tokens: jax.Array
    guessed: jax.Array


def count_positions(batch: Batch, mesh: MeshShape) -> PositionCounts:
    """Returns the counts of the batch of which `batch` is this device's part."""
    kind, term = jnp.asarray(batch["kind"]), jnp.asarray(batch["term"])
    masks = PositionCounts(
        micro_turns=kind == PositionKind.TURN,
        gate=term == Term.GATE,
        heard=term == Term.HEARD,
        text=term == Term.TEXT,
        spoken=jnp.asarray(batch["speech_valid"]),
        tokens=kind != PositionKind.PAD,
        guessed=_draft_begins(term),
    )
    return jax.tree.map(lambda mask: jnp.maximum(psum(mask.sum(), mesh, BATCH_AXES), 1), masks)


def loss_fn(
    model: InteractionModel, params: Params, batch: Batch, row_keys: jax.Array, counts: PositionCounts
) -> tuple[jax.Array, tuple[Terms, list[MoEStats]]]:
    """Computes the part of the batch's loss that the given rows contribute.

    Args:
      model: the model; its placement says on which mesh it runs.
      params: this device's parts of the parameters.
      batch: the rows, `[B, ...]` each (see `jaxtml.data.rows.pad`).
      row_keys: `[B]` random keys, one for each row, so that a row's noise does not depend on its device.
      counts: of the whole batch.

    Returns:
      The weighted sum of the terms, the terms by name, and the stats of the MoE layers. Added up over all devices and
      all parts of a batch, they are the values of the whole batch.
    """
    config = model.config.train
    dtype = jnp.dtype(config.compute_dtype)
    params = model.all_gather_trunk(params, dtype)
    bins = corrupt_history(batch["bins"], batch["kind"], model.config.flow, row_keys)
    inputs = Inputs(batch["kind"], batch["ids"], bins, batch["clock"], batch["patches"])
    embedded = model.embed(params, inputs, dtype)
    hidden, stats = model.hidden_from_embedded(params, embedded, inputs.kind, config.remat)

    terms = _text_terms(model, params, hidden, batch, counts)
    terms |= _flow_terms(model, params, hidden, batch, row_keys, counts)
    layers = max(sum(s.z_loss.size for s in stats), 1)
    terms["router_z"] = sum((s.z_loss.sum() for s in stats), jnp.zeros(())) / (counts.tokens * layers)
    loss = (
        config.gate_weight * terms["gate"]
        + config.heard_weight * terms["heard"]
        + config.text_weight * terms["text"]
        + config.flow_weight * terms["flow"]
        + config.z_loss * terms["router_z"]
    )
    if model.config.duplex.draft:
        terms |= _draft_terms(model, params, hidden, batch, counts)
        loss = loss + DRAFT_WEIGHT * terms["draft"]
    if model.mtp is not None:
        terms |= _prediction_head_terms(model, params, hidden, embedded, batch, counts)
        loss = loss + config.mtp_weight * terms["mtp"]
    return loss, (terms, stats)


def _text_terms(
    model: InteractionModel, params: Params, hidden: jax.Array, batch: Batch, counts: PositionCounts
) -> Terms:
    """Returns the cross-entropy of gate, heard words and said text, and the share of each that is predicted right.

    The cross-entropy is summed and divided by the number of micro-turns. At some positions "a word was heard" competes
    with "nothing happened"; with one divisor for all text terms, the probabilities there stay calibrated.
    """
    nll, right = model.scores(params, hidden, batch["target"])
    terms: Terms = {}
    for name, term in TEXT_TERMS:
        chosen = batch["term"] == term
        terms[name] = jnp.where(chosen, nll, 0).sum() / counts.micro_turns
        terms[f"{name}_right"] = (chosen & right).sum() / getattr(counts, name)
    return terms


def _flow_terms(
    model: InteractionModel,
    params: Params,
    hidden: jax.Array,
    batch: Batch,
    row_keys: jax.Array,
    counts: PositionCounts,
) -> Terms:
    """Returns the flow head's loss, a mean over own-speech positions, and the number of positions that it left out."""
    row, slot, valid = _used_slots(jnp.asarray(batch["speech_valid"]))
    spoken = hidden[row, jnp.asarray(batch["speech_at"])[row, slot]]
    target = jnp.asarray(batch["speech"])[row, slot].astype(jnp.float32)
    before = corrupt_frames(_frames_before(batch, row, slot), model.config.flow, row_keys, row, slot)
    slot_keys = jax.vmap(lambda r, s: jax.random.fold_in(jax.random.fold_in(row_keys[r], 1), s))(row, slot)
    return {
        "flow": model.bind(params).flow.loss(spoken, before, target, valid, slot_keys) / counts.spoken,
        "flow_left_out": jnp.asarray(batch["speech_valid"]).sum() - valid.sum(dtype=jnp.float32),
    }


def _frames_before(batch: Batch, row: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns the normalised log-mels of the 50 ms before each selected own-speech slot, `[N, 400]`.

    They are silence where the assistant begins to speak.
    """
    at = jnp.asarray(batch["speech_at"])
    micro_turn = jnp.cumsum(jnp.asarray(batch["kind"]) == PositionKind.TURN, axis=1)
    previous = jnp.maximum(slot - 1, 0)
    gap = micro_turn[row, at[row, slot]] - micro_turn[row, at[row, previous]]
    continues = (slot > 0) & (gap <= 1)
    mels = jnp.asarray(batch["speech"])[row, previous].astype(jnp.float32)
    return normalise(jnp.where(continues[:, None], mels, SILENT_MELS))


def _used_slots(valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the own-speech slots in use.

    A row that is almost all speech fills its slots, but eight rows together hardly ever fill half of their slots. A
    flow head that worked on all slots would mostly work on padding. So from `MANY_ROWS` rows on, at most half of all
    slots are selected. Slots in use beyond this half are left out of the loss.

    Args:
      valid: `[B, S]` bool, the slots in use.

    Returns:
      Row `[N]` and slot `[N]` int32 of each selected slot, and whether it is in use `[N]` bool. N is B * S, or half of
      it from `MANY_ROWS` rows on.
    """
    size = valid.size // 2 if len(valid) >= MANY_ROWS else valid.size
    at = jnp.nonzero(valid.reshape(-1), size=size, fill_value=0)[0]
    return at // valid.shape[1], at % valid.shape[1], jnp.arange(size) < valid.sum()


def _draft_terms(
    model: InteractionModel, params: Params, hidden: jax.Array, batch: Batch, counts: PositionCounts
) -> Terms:
    """Returns the cross-entropy of the drafter's guesses, and the share of first guesses that is right.

    The drafter learns beside the model: no gradient of its loss reaches the model. It begins at positions that predict
    a token after which the micro-turn has at least one more. It guesses the tokens behind that one.
    """
    params = jax.lax.stop_gradient({**params, "draft": {}}) | {"draft": params["draft"]}
    trunk = model.bind(params)
    term, target = jnp.asarray(batch["term"]), jnp.asarray(batch["target"])
    begins = _draft_begins(term)
    size = len(begins) * _drafts_per_row(term)
    at = jnp.nonzero(begins.reshape(-1), size=size, fill_value=0)[0]
    row, position = at // term.shape[1], at % term.shape[1]
    state = jax.lax.stop_gradient(hidden)[row, position]
    guessed = jnp.arange(size) < begins.sum()
    terms: Terms = {"draft": jnp.zeros(())}
    for ahead in range(1, model.config.duplex.draft + 1):
        state = trunk.draft(state, trunk.embed(target[row, position + ahead - 1], state.dtype))
        guessed &= _text_ahead(term, ahead)[row, position]
        scores = model.scores(params, state, target[row, jnp.minimum(position + ahead, term.shape[1] - 1)])
        terms["draft"] += jnp.where(guessed, scores.nll, 0).sum() / counts.micro_turns
        if ahead == 1:
            terms["draft_right"] = (guessed & scores.right).sum() / counts.guessed
    return terms


def _drafts_per_row(term: jax.Array) -> int:
    return max(term.shape[1] // _POSITIONS_PER_DRAFT, 1)


def _draft_begins(term: jax.Array) -> jax.Array:
    """Returns the positions `[B, T]` at which the drafter learns to begin: in each row, the first so many that can."""
    can = _text_ahead(term, 1)
    return can & (jnp.cumsum(can, axis=1) <= _drafts_per_row(term))


def _text_ahead(term: jax.Array, ahead: int) -> jax.Array:
    """Returns, for each position `[B, T]`, whether it and the `ahead` positions after it all predict a token."""
    positions = term.shape[1]
    predicts = jnp.pad(term != Term.NONE, ((0, 0), (0, ahead)))
    return jnp.stack([predicts[:, i : positions + i] for i in range(ahead + 1)]).all(axis=0)


def _prediction_head_terms(
    model: InteractionModel,
    params: Params,
    hidden: jax.Array,
    embedded: jax.Array,
    batch: Batch,
    counts: PositionCounts,
) -> Terms:
    """Returns the loss of the prediction heads, which predict tokens further ahead.

    "mtp" is the weighted sum of the text terms of each head, averaged over the heads. "mtp_right" is the share of gate,
    heard and text tokens that a head predicts right, also averaged over the heads.
    """
    config, heads = model.config.train, model.config.backbone.mtp_heads
    nll, right = model.mtp_scores(params, hidden, embedded, batch["target"], config.remat)  # [H, B, T]
    positions = nll.shape[2]
    beyond = jnp.pad(batch["term"], ((0, 0), (0, heads)))
    term = jnp.stack([beyond[:, ahead : ahead + positions] for ahead in range(1, heads + 1)])
    weights = {Term.GATE: config.gate_weight, Term.HEARD: config.heard_weight, Term.TEXT: config.text_weight}
    lost = sum(weight * jnp.where(term == kind, nll, 0).sum() for kind, weight in weights.items())
    chosen = (term == Term.GATE) | (term == Term.HEARD) | (term == Term.TEXT)
    return {
        "mtp": lost / (counts.micro_turns * heads),
        "mtp_right": (chosen & right).sum() / (heads * (counts.gate + counts.heard + counts.text)),
    }
