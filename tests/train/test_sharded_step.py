"""The training step on eight devices equals the training step on one: same losses, gradients and next state."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.config import AttentionConfig, Config
from jaxtml.errors import InputError
from jaxtml.model import vocabulary
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.placement import Placement, partition_specs
from jaxtml.model.spec import flatten
from jaxtml.parallel.mesh import BATCH_AXES, TRAIN, MeshShape, make_mesh
from jaxtml.train.gradients import make_gradients
from jaxtml.train.parameters import parameter_shapes
from jaxtml.train.step import make_train_step

ROWS = 8
MESHES = [
    MeshShape(replica=2, data=2, expert=2),
    MeshShape(data=2, expert=2, tensor=2),
    MeshShape(data=8),
]


@pytest.fixture(scope="module")
def config(small) -> Config:
    """Sliding and global layers, dense and MoE. Eight devices can split the heads and every other axis evenly."""
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=12, rel_extent=8)
    backbone = dataclasses.replace(
        small.backbone, n_layers=2, global_layers=(1,), sliding=attention, vocab_size=304, d_ff_expert=16, mtp_heads=1
    )
    return dataclasses.replace(small, backbone=backbone, train=dataclasses.replace(small.train, z_loss=0.01))


@pytest.fixture(scope="module")
def params(config, lively):
    return lively(config)


@pytest.fixture(scope="module")
def batch(config, random_batch) -> dict[str, np.ndarray]:
    return random_batch(config, range(30, 30 + ROWS))


@pytest.fixture(scope="module")
def single_device(config, params, batch):
    """The gradients of the batch on one device."""
    return jax.device_get(jax.jit(make_gradients(InteractionModel(config)))(params, batch, jax.random.key(3)))


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_terms_stats_and_gradients_are_those_of_one_device(
    mesh_shape, config, params, batch, single_device, monkeypatch
):
    # The mesh works on several chunks of the vocabulary. `single_device` worked on one chunk.
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", 10_000)
    model = InteractionModel(config, Placement(mesh_shape))
    mesh = make_mesh(mesh_shape)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(model.specs(), mesh_shape, TRAIN))
    with jax.set_mesh(mesh):
        ours = jax.jit(make_gradients(model))(
            jax.device_put(params, shardings),
            jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES))),
            jax.random.key(3),
        )
    assert all(
        jax.tree.leaves(jax.tree.map(lambda g, s: g.sharding.is_equivalent_to(s, g.ndim), ours.gradients, shardings))
    )
    terms, stats, grads = jax.device_get(ours)
    for name, value in single_device.terms.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for a, b in zip(stats, single_device.stats, strict=True):
        np.testing.assert_array_equal(a.load, b.load)
        np.testing.assert_allclose(a.z_loss, b.z_loss, rtol=1e-5)
        assert not a.dropped.any()
    for (path, a), (_, b) in zip(flatten(grads), flatten(single_device.gradients), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b) + 1e-9, path


def test_a_step_keeps_the_layout_of_its_state(config, params, batch):
    shape = MeshShape(data=4, expert=2)
    model = InteractionModel(config, Placement(shape))
    mesh = make_mesh(shape)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(model.specs(), shape, TRAIN))
    init, step = make_train_step(model)
    with jax.set_mesh(mesh):
        state = jax.jit(init)(jax.device_put(params, shardings))
        rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
        after, metrics = jax.jit(step)(state, rows)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, after))
    )
    assert int(after.step) == 1 and int(metrics["skipped"]) == 0
    w2 = after.params["layers"]["block0"]["run1"]["mlp"]["w2"]
    assert w2.addressable_shards[0].data.size * 8 == w2.size


def test_heads_that_a_mesh_cannot_share_are_refused(small):
    with pytest.raises(InputError, match="tensor=2 does not divide 1 kv heads"):
        InteractionModel(small, Placement(MeshShape(tensor=2)))


@pytest.mark.parametrize("mesh_shape", [MeshShape(), MeshShape(data=2)], ids=str)
def test_a_batch_in_parts_has_the_gradients_of_the_whole_batch(mesh_shape, config, params, batch, single_device):
    parts = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2, remat="full"))
    model = InteractionModel(parts, Placement(mesh_shape))
    if mesh_shape.devices > 1:
        mesh = make_mesh(mesh_shape, jax.devices()[: mesh_shape.devices])
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), partition_specs(model.specs(), mesh_shape, TRAIN)
        )
        arguments = (
            jax.device_put(params, shardings),
            jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES))),
            jax.random.key(3),
        )
        with jax.set_mesh(mesh):
            terms, stats, grads = jax.device_get(jax.jit(make_gradients(model))(*arguments))
    else:
        terms, stats, grads = jax.device_get(jax.jit(make_gradients(model))(params, batch, jax.random.key(3)))
    for name, value in single_device.terms.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for a, b in zip(stats, single_device.stats, strict=True):
        np.testing.assert_array_equal(a.load, b.load)
    for (path, a), (_, b) in zip(flatten(grads), flatten(single_device.gradients), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b) + 1e-9, path


def test_a_batch_without_patches_is_cut_into_parts_too(config, batch):
    without_video = dataclasses.replace(
        config,
        duplex=dataclasses.replace(config.duplex, max_patches=0),
        train=dataclasses.replace(config.train, accumulate=2),
    )
    model = InteractionModel(without_video)
    rows = {**batch, "patches": batch["patches"][:, :0]}
    terms, *_ = jax.eval_shape(make_gradients(model), parameter_shapes(model), rows, jax.random.key(0))
    assert terms["loss"].shape == ()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_state_in_bfloat16_stays_what_it_is(config, batch, accumulate):
    train = dataclasses.replace(
        config.train, param_dtype="bfloat16", moment_dtype="bfloat16", compute_dtype="bfloat16", accumulate=accumulate
    )
    init, step = make_train_step(InteractionModel(dataclasses.replace(config, train=train)))
    state = jax.eval_shape(init, parameter_shapes(InteractionModel(dataclasses.replace(config, train=train))))
    after, _ = jax.eval_shape(step, state, batch)
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after)]
    assert kinds[0] == kinds[1]
    assert state.params["embed"]["weight"].dtype == "bfloat16"
    assert state.params["layers"]["block0"]["run1"]["mlp"]["router_bias"].dtype == "float32"
