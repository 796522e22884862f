"""A micro-turn on eight devices is the micro-turn of one: sessions split over some, experts and heads over others."""

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
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement
from jaxtml.model.spec import flatten
from jaxtml.parallel.mesh import MeshShape, make_mesh
from tests.model.duplex.test_step import Run, assert_same, mixed_inputs, ran

SLOTS = 4
TURNS = 8
MESHES = {
    "sessions and experts on the same devices": Placement(MeshShape(data=2, expert=2, tensor=2), "ring"),
    "every device has every session": Placement(MeshShape(expert=4, tensor=2), "replicated"),
    "groups of devices have their own sessions": Placement(MeshShape(replica=2, expert=2, tensor=2), "replicated"),
}


@pytest.fixture(scope="module")
def config(small) -> Config:
    """Heads that two devices can share."""
    sliding = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=12, rel_extent=8)
    return dataclasses.replace(
        small, backbone=dataclasses.replace(small.backbone, sliding=sliding, vocab_size=304, d_ff_expert=16)
    )


@pytest.fixture(scope="module")
def params(config, lively):
    return lively(config)


def sessions_alone(duplex: Duplex, params):
    params = jax.jit(duplex.prepare)(params)
    inputs = mixed_inputs(duplex, SLOTS, TURNS)
    return ran(duplex.compiled(params, SLOTS), params, duplex.init_state(SLOTS, 3), inputs)


@pytest.fixture(scope="module")
def alone(config, params):
    return sessions_alone(Duplex(InteractionModel(config), trace=True), params)


@pytest.mark.parametrize("case", MESHES)
def test_sessions_on_a_mesh_are_those_of_one_device(case, config, params, alone):
    ours = sessions_on_mesh(MESHES[case], config, params, alone.inputs)
    assert any(out.speaking.any() for out in ours.outputs)
    assert_same(ours.outputs, alone.outputs, exact=False)
    np.testing.assert_array_equal(ours.state.position, alone.state.position)


def sessions_on_mesh(placement: Placement, config: Config, params, inputs) -> Run:
    duplex = Duplex(InteractionModel(config, placement), trace=True)
    mesh = make_mesh(placement.mesh)
    with jax.set_mesh(mesh):
        held, state_layout, inputs_layout = jax.tree.map(lambda spec: NamedSharding(mesh, spec), duplex.layouts())
        ready = jax.jit(duplex.prepare, out_shardings=held)(params)
        state = jax.jit(lambda: duplex.init_state(SLOTS, 3), out_shardings=state_layout)()
        inputs = [jax.device_put(given, inputs_layout) for given in inputs]
        step = jax.jit(duplex.step, donate_argnums=1).lower(ready, state, inputs[0]).compile()
        ours = ran(step, ready, state, inputs)
    experts = next(array for path, array in flatten(ready) if path.endswith("mlp/w2") and array.ndim == 5)
    assert experts.addressable_shards[0].data.size * placement.mesh.expert * 2 == experts.size
    return ours


def test_a_stack_that_is_scanned_gives_what_its_layers_give_one_by_one(config, params, alone, monkeypatch):
    monkeypatch.setattr(backbone, "MAX_UNROLLED_LAYERS", 2)
    monkeypatch.setattr(cache, "MAX_LOGITS", 1000)  # a few queries at a time
    duplex = Duplex(InteractionModel(config), trace=True)
    assert not duplex.model.backbone.unrolled
    assert_same(sessions_alone(duplex, params).outputs, alone.outputs, exact=False)


def test_int8_experts_change_logits_little_and_equally_on_a_mesh_and_in_a_scanned_stack(
    config, params, alone, monkeypatch
):
    int8 = InteractionModel(config, Placement(int8=True))
    ours = sessions_alone(Duplex(int8, trace=True), params)
    first, exact = ours.outputs[0].logits[0, 0], alone.outputs[0].logits[0, 0]
    error = np.linalg.norm(first - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02
    # A column's scale is that of all its rows, which `tensor` shares.
    mesh = Placement(MeshShape(data=2, expert=2, tensor=2), int8=True)
    assert_same(sessions_on_mesh(mesh, config, params, ours.inputs).outputs, ours.outputs, exact=False)
    monkeypatch.setattr(backbone, "MAX_UNROLLED_LAYERS", 2)
    scanned = sessions_alone(Duplex(InteractionModel(config, Placement(int8=True)), trace=True), params)
    assert_same(scanned.outputs, ours.outputs, exact=False)


def test_sessions_that_a_mesh_cannot_share_are_refused(config):
    duplex = Duplex(InteractionModel(config, Placement(MeshShape(expert=4, tensor=2))))
    with pytest.raises(InputError, match="6 sessions do not divide into 4 parts, of mesh expert=4,tensor=2"):
        duplex.check_sessions(6)
