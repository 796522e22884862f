"""A micro-turn on eight devices gives what one device gives. Sessions, experts and heads are split over the devices."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtml.config import AttentionConfig, Config
from jaxtml.errors import InputError
from jaxtml.model import backbone
from jaxtml.model.attention import cache
from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.duplex.state import MicroTurnInputs
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import Params, flatten
from jaxtml.parallel.mesh import MeshShape, make_mesh
from tests.model.duplex.running import SLOTS, Run, assert_same, mixed_inputs, run_step

MICRO_TURNS = 8
MESHES = {
    "sessions and experts on the same devices": Placement(MeshShape(data=2, expert=2, tensor=2), "ring"),
    "every device has every session": Placement(MeshShape(expert=4, tensor=2), "replicated"),
    "groups of devices have their own sessions": Placement(MeshShape(replica=2, expert=2, tensor=2), "replicated"),
}


@pytest.fixture(scope="module")
def config(small) -> Config:
    """The small config with heads that two devices can split evenly."""
    sliding = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=12, rel_extent=8)
    return dataclasses.replace(
        small, backbone=dataclasses.replace(small.backbone, sliding=sliding, vocab_size=304, d_ff_expert=16)
    )


@pytest.fixture(scope="module")
def params(config, lively) -> Params:
    return lively(config)


def run_on_one_device(duplex: Duplex, params: Params) -> Run:
    params = jax.jit(duplex.prepare)(params)
    inputs = mixed_inputs(duplex, SLOTS, MICRO_TURNS)
    return run_step(duplex.compiled(params, SLOTS), params, duplex.init_state(SLOTS, 3), inputs)


def run_on_mesh(placement: Placement, config: Config, params: Params, inputs: list[MicroTurnInputs]) -> Run:
    duplex = Duplex(InteractionModel(config, placement), trace=True)
    mesh = make_mesh(placement.mesh)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), duplex.layouts())
        params_shardings, state_shardings, inputs_shardings = shardings
        ready = jax.jit(duplex.prepare, out_shardings=params_shardings)(params)
        state = jax.jit(lambda: duplex.init_state(SLOTS, 3), out_shardings=state_shardings)()
        inputs = [jax.device_put(micro_turn, inputs_shardings) for micro_turn in inputs]
        step = jax.jit(duplex.step, donate_argnums=1).lower(ready, state, inputs[0]).compile()
        run = run_step(step, ready, state, inputs)
    experts = next(array for path, array in flatten(ready) if path.endswith("mlp/w2") and array.ndim == 5)
    assert experts.addressable_shards[0].data.size * placement.mesh.expert * 2 == experts.size
    return run


@pytest.fixture(scope="module")
def one_device(config, params) -> Run:
    return run_on_one_device(Duplex(InteractionModel(config), trace=True), params)


@pytest.mark.parametrize("case", MESHES)
def test_sessions_on_a_mesh_are_those_of_one_device(case, config, params, one_device):
    run = run_on_mesh(MESHES[case], config, params, one_device.inputs)
    assert any(out.speaking.any() for out in run.outputs)
    assert_same(run.outputs, one_device.outputs, exact=False)
    np.testing.assert_array_equal(run.state.position, one_device.state.position)


def test_sessions_on_a_mesh_are_those_of_one_device_also_where_many_tokens_travel(
    config, params, one_device, monkeypatch
):
    """Few tokens travel to all experts in two collectives a layer; for many tokens, five collectives send less."""
    monkeypatch.setattr(backbone, "MAX_GROUP_BYTES", 0)
    run = run_on_mesh(MESHES["sessions and experts on the same devices"], config, params, one_device.inputs)
    assert_same(run.outputs, one_device.outputs, exact=False)


def test_a_scanned_stack_gives_what_its_layers_give_one_by_one(config, params, one_device, monkeypatch):
    monkeypatch.setattr(backbone, "MAX_UNROLLED_LAYERS", 2)
    monkeypatch.setattr(cache, "MAX_LOGITS", 1000)  # a few queries at a time
    duplex = Duplex(InteractionModel(config), trace=True)
    assert not duplex.model.backbone.unrolled
    assert_same(run_on_one_device(duplex, params).outputs, one_device.outputs, exact=False)


def test_int8_experts_change_logits_little_and_equally_on_a_mesh_and_in_a_scanned_stack(
    config, params, one_device, monkeypatch
):
    int8 = Duplex(InteractionModel(config, Placement(int8=True)), trace=True)
    run = run_on_one_device(int8, params)
    first, exact = run.outputs[0].logits[0, 0], one_device.outputs[0].logits[0, 0]
    error = np.linalg.norm(first - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02
    # The scale of a column is computed from all its rows. The devices along `tensor` split the rows of `w2`.
    mesh = Placement(MeshShape(data=2, expert=2, tensor=2), int8=True)
    assert_same(run_on_mesh(mesh, config, params, run.inputs).outputs, run.outputs, exact=False)
    monkeypatch.setattr(backbone, "MAX_UNROLLED_LAYERS", 2)
    scanned = run_on_one_device(Duplex(InteractionModel(config, Placement(int8=True)), trace=True), params)
    assert_same(scanned.outputs, run.outputs, exact=False)


def test_a_number_of_sessions_that_a_mesh_cannot_share_is_refused(config):
    duplex = Duplex(InteractionModel(config, Placement(MeshShape(expert=4, tensor=2))))
    with pytest.raises(InputError, match="expert=4,tensor=2 splits the sessions into 4 equal parts, and 6 is not"):
        duplex.check_sessions(6)
