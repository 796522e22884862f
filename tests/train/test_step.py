"""One training step: every loss term reaches the parameters that it should, the optimizer leaves the others alone, and
a bad batch changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import Config
from jaxtml.model import backbone
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, flatten
from jaxtml.parallel.mesh import MeshShape
from jaxtml.stream.tokens import PositionKind, Term
from jaxtml.train.balance import expert_balance
from jaxtml.train.history import corrupt_history
from jaxtml.train.loss import DRAFT_WEIGHT, count_positions, loss_fn
from jaxtml.train.optimizer import schedule
from jaxtml.train.step import TrainState, make_train_step

TERMS = ("gate", "heard", "text", "flow", "draft", "router_z")
BIAS_RATE = 0.05


@pytest.fixture(scope="module")
def config(small) -> Config:
    """Three layers, the last two in one stack. More layers would make the step too slow to compile."""
    backbone = dataclasses.replace(small.backbone, n_layers=3, global_layers=(1, 2))
    train = dataclasses.replace(small.train, steps=1000, warmup=0, bias_rate=BIAS_RATE, flow_weight=0.5, z_loss=0.01)
    return dataclasses.replace(small, backbone=backbone, train=train)


@pytest.fixture(scope="module")
def params(config, lively) -> Params:
    return lively(config)


@pytest.fixture(scope="module")
def batch(config, random_batch) -> dict[str, np.ndarray]:
    """Two rows with typed text, frames, words and speech. Both end in padding."""
    made = random_batch(config, (36, 20))
    kinds, terms = set(made["kind"].ravel().tolist()), set(made["term"].ravel().tolist())
    assert kinds == set(PositionKind) and terms == set(Term), "the batch lacks a kind of position or a term"
    return made


@pytest.fixture(scope="module")
def functions(config) -> tuple[Any, Any]:
    init, step = make_train_step(InteractionModel(config))
    return init, jax.jit(step)


@pytest.fixture(scope="module")
def stepped(functions, params, batch) -> tuple[TrainState, TrainState, dict[str, jax.Array]]:
    """The state before and after the first step, and its metrics."""
    init, step = functions
    state = init(params)
    after, metrics = step(state, batch)
    return state, after, metrics


@pytest.fixture(scope="module", params=[backbone.MAX_UNROLLED_LAYERS, 0], ids=["unrolled", "scanned"])
def gradients(request, config, params, batch) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """The gradient of each term by itself, `{term: {path: array}}`, with layers unrolled and scanned."""
    model = InteractionModel(config)

    def weighted(p: Params, weights: jax.Array) -> jax.Array:
        rows = jax.random.split(jax.random.key(0), len(batch["kind"]))
        _, (terms, _) = loss_fn(model, p, batch, rows, count_positions(batch, MeshShape()))
        return sum(w * terms[name] for w, name in zip(weights, TERMS, strict=True))

    grad = jax.jit(jax.grad(weighted))
    one_term = np.eye(len(TERMS), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "MAX_UNROLLED_LAYERS", request.param)
        yield {name: dict(flatten(jax.device_get(grad(params, w)))) for w, name in zip(one_term, TERMS, strict=True)}


def layers_of(spec: Any, leaf: np.ndarray) -> np.ndarray:
    """Returns `[layers, N]`: one row for each layer of the stack."""
    return leaf.reshape(int(np.prod(leaf.shape[: spec.stacked])), -1)


def test_every_trained_parameter_of_every_layer_gets_a_gradient(config, gradients):
    table = dict(flatten(InteractionModel(config).specs()))
    for path, spec in table.items():
        total = sum(np.abs(gradients[name][path]) for name in TERMS)
        if path.startswith("vocoder/") or not spec.trained:
            assert not total.any(), path
        else:
            assert (layers_of(spec, total).max(axis=1) > 0).all(), f"{path} is dead in some layer"
            if "expert" in spec.axes:
                experts = total.reshape(-1, *spec.shape[spec.stacked :]).max(axis=(2, 3))
                assert (experts.reshape(experts.shape[0], experts.shape[1], -1).max(axis=2) > 0).all(), path


@pytest.mark.parametrize("term", [term for term in TERMS if term != "draft"])
def test_every_term_reaches_down_to_the_first_layer_and_the_embeddings(gradients, term):
    for path in (
        "layers/block0/run0/attn/wv",
        "layers/block0/run0/mlp/w2",
        "audio/weight",
        "embed/weight",
        "clock/weight",
    ):
        assert np.abs(gradients[term][path]).max() > 0, path


def test_a_head_learns_from_its_own_terms_alone(gradients):
    for path, leaf in gradients["flow"].items():
        spoken = path.startswith("flow/")
        assert (path != "unembed") or not leaf.any()
        for term in ("gate", "heard", "text", "router_z"):
            assert not spoken or not gradients[term][path].any(), f"{term} moves {path}"
    for term in ("gate", "heard", "text"):
        assert gradients[term]["unembed"].any()


def test_the_drafter_learns_beside_the_model(gradients):
    moved = {path for path, leaf in gradients["draft"].items() if leaf.any()}
    assert moved == {path for path in gradients["draft"] if path.startswith("draft/")}
    for term in TERMS[:4]:
        assert not any(leaf.any() for path, leaf in gradients[term].items() if path.startswith("draft/")), term


def test_only_own_speech_is_corrupted_and_some_rows_lose_all_of_it(config):
    flow = dataclasses.replace(config.flow, history_noise=1.0, history_dropout=1.5)
    rng = np.random.default_rng(5)
    bins = rng.integers(2, 16, (64, 50, 80)).astype(np.uint8)
    kind = rng.choice(np.array([PositionKind.USER, PositionKind.OWN], np.uint8), (64, 50))
    keys = jax.random.split(jax.random.key(2), len(bins))
    corrupted = np.asarray(corrupt_history(jnp.asarray(bins), jnp.asarray(kind), flow, keys))
    own = kind == PositionKind.OWN
    np.testing.assert_array_equal(corrupted[~own], bins[~own])
    missing = own & ~corrupted.any(axis=-1)
    share = missing.sum(axis=1) / own.sum(axis=1)
    assert 0.15 < (share == 1).mean() < 0.55, "a third of the rows is expected to lose everything"
    assert share.min() < 0.2 and ((share > 0.2) & (share < 0.8)).mean() > 0.2
    noise = np.abs(corrupted[own & ~missing].astype(int) - bins[own & ~missing])
    assert noise.any() and noise.mean() < 1.0
    unchanged = dataclasses.replace(flow, history_noise=0.0, history_dropout=0.0)
    np.testing.assert_array_equal(corrupt_history(jnp.asarray(bins), jnp.asarray(kind), unchanged, keys), bins)


def test_the_loss_is_the_weighted_sum_of_its_terms(config, stepped):
    *_, metrics = stepped
    t = config.train
    weights = (t.gate_weight, t.heard_weight, t.text_weight, t.flow_weight, DRAFT_WEIGHT, t.z_loss)
    expected = sum(w * float(metrics[name]) for w, name in zip(weights, TERMS, strict=True))
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert all(float(metrics[name]) > 0 for name in TERMS)
    assert all(0 <= float(metrics[f"{name}_right"]) <= 1 for name in ("gate", "heard", "text", "draft"))


def test_the_optimizer_moves_all_parameters_except_the_vocoder_and_the_router_bias(config, stepped):
    before, after, _ = stepped
    table = dict(flatten(InteractionModel(config).specs()))
    old, new = dict(flatten(before.params)), dict(flatten(after.params))
    for path, spec in table.items():
        a, b = np.asarray(old[path]), np.asarray(new[path])
        if path.startswith("vocoder/"):
            np.testing.assert_array_equal(a, b, err_msg=path)
        elif path.endswith("router_bias"):
            moved = np.round((b - a) / BIAS_RATE, 4)
            assert set(np.unique(moved)) <= {-1.0, 0.0, 1.0} and moved.any(), path
        else:
            assert (layers_of(spec, np.abs(a - b)).max(axis=1) > 0).all(), path
    assert int(after.step) == 1


def test_the_router_bias_balances_the_experts(functions, params, batch):
    init, step = functions
    crowded = jax.tree_util.tree_map_with_path(
        lambda path, a: a.at[..., 0].add(0.5) if path[-1].key == "router_bias" else a, params
    )
    state, loads = init(crowded), []
    for _ in range(25):
        state, metrics = step(state, batch)
        balance = expert_balance(np.asarray(metrics["load"]))
        loads.append((balance["load_max"], balance["load_min"]))
    assert loads[0][0] > 1.9, "nearly every token chose expert 0 as one of its two"
    assert max(most for most, _ in loads[-5:]) < 1.5
    assert min(least for _, least in loads[-5:]) > loads[0][1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 6e4])
def test_a_batch_without_a_usable_gradient_changes_nothing_but_the_counter(config, functions, stepped, batch, bad):
    _, step = functions
    _, state, _ = stepped
    speech = batch["speech"].copy()
    speech[:] = bad
    after, metrics = step(state, {**batch, "speech": speech})
    assert int(metrics["skipped"]) == 1 and not metrics["grad_norm"] < config.train.norm_limit
    assert np.isfinite(metrics["loss"]) == np.isfinite(bad)
    assert int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.moments), (state.params, state.moments))
    again, metrics = step(after, batch)
    assert int(metrics["skipped"]) == 0 and np.isfinite(metrics["loss"])
    assert int(again.step) == int(state.step) + 2


def test_steps_in_bfloat16_learn_as_steps_in_float32_do(config, functions, params, batch):
    low = dict.fromkeys(("compute_dtype", "param_dtype", "moment_dtype"), "bfloat16")
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, **low))
    init, step = make_train_step(InteractionModel(half))
    table = InteractionModel(half).specs()
    cast = jax.tree.map(lambda a, spec: a.astype("bfloat16" if spec.trained else "float32"), params, table)
    runs = []
    for make_state, compiled, start in ((functions[0], functions[1], params), (init, jax.jit(step), cast)):
        state, losses = make_state(start), []
        for _ in range(30):
            state, metrics = compiled(state, batch)
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[1][0] == pytest.approx(runs[0][0], rel=0.02)
    fallen = [losses[0] - np.mean(losses[-5:]) for losses in runs]
    assert 0.8 * fallen[0] < fallen[1] < 1.2 * fallen[0]


def test_a_step_is_a_function_of_its_state_and_batch(functions, stepped, batch):
    init, step = functions
    before, after, metrics = stepped
    again, same = step(before, batch)
    jax.tree.map(np.testing.assert_array_equal, again, after)
    jax.tree.map(np.testing.assert_array_equal, same, metrics)
    _, later = step(before._replace(step=jnp.int32(7)), batch)
    assert later["flow"] != metrics["flow"], "each step draws its own noise"


def test_the_contents_of_padding_do_not_matter(functions, stepped, batch):
    _, step = functions
    before, _, metrics = stepped
    padding = batch["kind"] == PositionKind.PAD
    assert padding.any()
    other = dict(batch)
    other["ids"] = np.where(padding, 77, batch["ids"])
    other["bins"] = np.where(padding[..., None], 9, batch["bins"]).astype(np.uint8)
    other["clock"] = np.where(padding[..., None], 5.0, batch["clock"]).astype(np.float32)
    other["target"] = np.where(padding, 77, batch["target"])
    _, same = step(before, other)
    for name in ("loss", *TERMS, "grad_norm"):
        np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5, err_msg=name)


def test_one_batch_is_learnt_by_heart(functions, params, batch):
    init, step = functions
    state, losses = init(params), []
    for _ in range(120):
        state, metrics = step(state, batch)
        losses.append({name: float(metrics[name]) for name in ("loss", "gate", "heard", "text", "flow")})
    for name in ("gate", "heard", "text"):
        assert losses[-1][name] < 0.3 * losses[0][name], (name, losses[0][name], losses[-1][name])
    assert np.mean([loss["flow"] for loss in losses[-10:]]) < 0.7 * np.mean([loss["flow"] for loss in losses[:5]])


def test_the_learning_rate_warms_up_stays_and_falls_to_zero(config):
    rate = schedule(dataclasses.replace(config.train, steps=100, warmup=10, decay=0.3, learning_rate=2e-3))
    values = np.array([float(rate(step)) for step in range(101)])
    assert values[0] == 0 and (np.diff(values[:11]) > 0).all()
    np.testing.assert_allclose(values[10:71], 2e-3, rtol=1e-6)
    assert (np.diff(values[70:]) < 0).all() and values[100] == 0
