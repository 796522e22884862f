"""Prediction heads give the released logits, see no position that they must not see, and train every part below."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.mapping import released_tensors
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.source import InMemorySource
from jaxtml.config import Config
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.errors import InputError
from jaxtml.model import mtp
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.flops import forward_flops_per_token, train_flops_per_token
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.spec import Params, count_parameters, flatten, init_params
from jaxtml.model.vocabulary import Scores
from jaxtml.parallel.mesh import MeshShape
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.tokens import PositionKind, Term
from jaxtml.train.history import corrupt_history
from jaxtml.train.loss import DRAFT_WEIGHT, count_positions, loss_fn

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_backbone_golden.py"), run_name="golden")
HEADS = TOOL["HEADS"]
BOUND = 3e-5  # relative error of float32 logits


def _text(ids: np.ndarray) -> Inputs:
    shape = ids.shape
    return Inputs(
        kind=jnp.full(shape, PositionKind.TEXT, jnp.uint8),
        ids=jnp.asarray(ids, jnp.int32),
        bins=jnp.zeros((*shape, 80), jnp.uint8),
        clock=jnp.zeros((*shape, CLOCK_FEATURES), jnp.float32),
        patches=jnp.zeros((shape[0], 0, 2, 40, 40, 3), jnp.float32),
    )


def _head_logits(config: Config, params: Params, ids: np.ndarray) -> np.ndarray:
    """Returns `[H, T - H, unpadded vocabulary]` for the one row of `ids`; checks the shift of each head's targets."""
    model = InteractionModel(config)
    assert model.mtp is not None

    def score(hidden: jax.Array, target: jax.Array) -> Scores:
        return Scores(model.logits(params, hidden), target)

    @jax.jit
    def forward(params: Params, inputs: Inputs) -> Scores:
        embedded = model.embed(params, inputs, jnp.float32)
        hidden, _ = model.hidden_from_embedded(params, embedded, inputs.kind)
        return model.mtp.predict(params["mtp"], hidden, embedded, inputs.ids, score)

    logits, target = forward(params, _text(ids))
    heads = config.backbone.mtp_heads
    for head in range(heads):
        np.testing.assert_array_equal(target[head, 0, : -head - 1], ids[0, head + 1 :])
    return np.asarray(logits)[:, 0, : ids.shape[1] - heads, : config.backbone.unpadded_vocab_size]


def _relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module")
def released() -> tuple[Config, Params]:
    config = config_from_inkling(TOOL["HEADS_CASE"])
    params = jax.tree.map(np.array, init_params(InteractionModel(config).specs(), 0))
    leaves, weights = dict(flatten(params)), TOOL["released_weights"](config)
    for place in released_tensors(config):
        leaves[place.path][place.position] = place.spec.released.load(weights[place.name])
    return config, params


@pytest.mark.parametrize("unrolled", [8, 0], ids=["unrolled", "scanned"])
def test_logits_equal_the_released_ones(unrolled, released, monkeypatch):
    monkeypatch.setattr(mtp, "MAX_UNROLLED_LAYERS", unrolled)
    config, params = released
    assert (config.backbone.mtp_heads, config.backbone.mtp_global) == (HEADS, (1,))
    ours = _head_logits(config, params, TOOL["case_inputs"]("text")["ids"][:1])
    with np.load(TOOL["GOLDEN"]) as golden:
        assert _relative_error(ours, golden["heads"]) <= BOUND


@pytest.mark.oracle
def test_transformers_reads_the_heads_that_we_save(released, tmp_path):
    pytest.importorskip("transformers")
    config, params = released
    write_checkpoint(InMemorySource(config, params), tmp_path, "memory", "hf", "float32")
    inputs = TOOL["case_inputs"]("text")
    reference = TOOL["reference_heads"](tmp_path, inputs)
    assert _relative_error(_head_logits(config, params, inputs["ids"][:1]), reference) <= BOUND


def test_heads_survive_export_and_import_and_may_be_in_a_file_of_their_own(released, tmp_path):
    from safetensors.numpy import load_file, save_file

    config, params = released
    write_checkpoint(InMemorySource(config, params), tmp_path, "memory", "hf", "float32")
    weights = load_file(tmp_path / "model.safetensors")
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("model.mtp.")}
    assert len(heads) == HEADS * 20, "as many tensors per head as the released heads have"
    save_file({name: t for name, t in weights.items() if name not in heads}, tmp_path / "model.safetensors")
    save_file(heads, tmp_path / "mtp.safetensors")
    again, loaded = read_checkpoint(tmp_path)
    assert again.backbone == config.backbone
    for (path, a), (_, b) in zip(flatten(params["mtp"]), flatten(loaded["mtp"]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    (tmp_path / "mtp.safetensors").unlink()
    without, loaded = read_checkpoint(tmp_path)
    assert without.backbone == dataclasses.replace(config.backbone, mtp_heads=0, mtp_global=())
    assert "mtp" not in loaded


def test_a_head_sees_as_far_as_its_depth_and_no_further(released):
    config, params = released
    ids = TOOL["case_inputs"]("text")["ids"][:1]
    at = 40
    changed = ids.copy()
    changed[0, at] = 99 if ids[0, at] != 99 else 98
    apart = np.abs(_head_logits(config, params, ids) - _head_logits(config, params, changed)).max(axis=-1)
    for head in range(HEADS):
        first = at - head - 1
        assert not apart[head, :first].any() and apart[head, first:at].min() > 0


@pytest.fixture(scope="module")
def config(small) -> Config:
    backbone = dataclasses.replace(small.backbone, n_layers=2, global_layers=(1,), mtp_heads=4, mtp_global=(1,))
    return dataclasses.replace(small, backbone=backbone)


@pytest.fixture(scope="module")
def params(config, lively) -> Params:
    return lively(config)


@pytest.fixture(scope="module")
def batch(config, random_batch) -> dict[str, np.ndarray]:
    return random_batch(config, (36, 20))


def _loss(config: Config, params: Params, batch: dict[str, np.ndarray]) -> tuple[jax.Array, dict[str, jax.Array]]:
    rows = jax.random.split(jax.random.key(0), len(batch["kind"]))
    loss, (terms, _) = loss_fn(InteractionModel(config), params, batch, rows, count_positions(batch, MeshShape()))
    return loss, terms


@pytest.mark.parametrize("unrolled", [8, 0], ids=["unrolled", "scanned"])
def test_every_parameter_of_every_head_learns_and_so_do_the_parts_below(unrolled, config, params, batch, monkeypatch):
    monkeypatch.setattr(mtp, "MAX_UNROLLED_LAYERS", unrolled)
    grads = jax.jit(jax.grad(lambda p: _loss(config, p, batch)[1]["mtp"]))(params)
    found = {path: np.asarray(grad) for path, grad in flatten(grads)}
    table = dict(flatten(InteractionModel(config).specs()))
    heads = 0
    for path, spec in table.items():
        if path.startswith("mtp/"):
            per_layer = np.abs(found[path]).reshape(int(np.prod(spec.shape[:2])), -1).max(axis=1)
            assert (per_layer > 0).all(), f"{path} is dead in some head"
            heads += spec.shape[0] * spec.shape[1] if path.endswith("input_proj") else 0
    assert heads == 4
    for path in (
        "layers/block0/run0/attn/wv",
        "embed/weight",
        "audio/weight",
        "clock/weight",
        "unembed",
        "norm/weight",
    ):
        assert found[path].any(), path
    assert not any(grad.any() for path, grad in found.items() if path.startswith("flow/"))


def test_the_loss_term_is_the_mean_over_heads_with_the_weights_of_their_targets(config, params, batch):
    train = dataclasses.replace(config.train, gate_weight=0.5, heard_weight=2.0, text_weight=3.0, mtp_weight=0.25)
    config = dataclasses.replace(config, train=train)
    model = InteractionModel(config)

    @jax.jit
    def forward(params: Params) -> Any:
        rows = jax.random.split(jax.random.key(0), len(batch["kind"]))
        bins = corrupt_history(batch["bins"], batch["kind"], config.flow, rows)
        inputs = Inputs(batch["kind"], batch["ids"], bins, batch["clock"], batch["patches"])
        embedded = model.embed(params, inputs, jnp.float32)
        hidden, _ = model.hidden_from_embedded(params, embedded, inputs.kind)
        return _loss(config, params, batch), model.mtp_scores(params, hidden, embedded, batch["target"])

    (loss, terms), scores = jax.device_get(forward(params))
    nll, right = scores
    shares = {"gate": 0.5, "heard": 2.0, "text": 3.0, "flow": 1.0, "router_z": train.z_loss, "mtp": 0.25}
    shares["draft"] = DRAFT_WEIGHT
    np.testing.assert_allclose(loss, sum(share * terms[name] for name, share in shares.items()), rtol=1e-5)
    weight = np.zeros(len(Term))
    weight[[Term.GATE, Term.HEARD, Term.TEXT]] = 0.5, 2.0, 3.0
    turns, total, correct = (batch["kind"] == PositionKind.TURN).sum(), 0.0, 0
    for head in range(4):
        term = batch["term"][:, head + 1 :]
        total += (weight[term] * nll[head, :, : -head - 1]).sum()
        correct += ((term != Term.NONE) & right[head, :, : -head - 1]).sum()
    np.testing.assert_allclose(terms["mtp"], total / (4 * turns), rtol=1e-5)
    np.testing.assert_allclose(terms["mtp_right"], correct / (4 * (batch["term"] != Term.NONE).sum()), rtol=1e-5)


def test_serving_reads_no_prediction_head(config, params):
    ready = jax.eval_shape(Duplex(InteractionModel(config)).prepare, params)
    assert "mtp" in params and "mtp" not in ready


def test_heads_count_as_parameters_and_as_work_of_training_only(config):
    bare = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, mtp_heads=0, mtp_global=()))
    (total, active), (fewer, same) = (count_parameters(InteractionModel(c).specs()) for c in (config, bare))
    b, (heads, _) = config.backbone, count_parameters(InteractionModel(config).specs()["mtp"])
    assert total - fewer == heads and active == same
    assert forward_flops_per_token(config, 99) == forward_flops_per_token(bare, 99)
    more = train_flops_per_token(config) - train_flops_per_token(bare)
    assert more > 3 * 2 * (heads + 4 * b.d_model * b.vocab_size)


def test_a_global_head_that_is_not_there_is_refused(config):
    from jaxtml.config import validate

    wrong = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, mtp_global=(4,)))
    with pytest.raises(InputError, match=r"backbone.mtp_global \(4,\): there are 4 heads"):
        validate(wrong)
