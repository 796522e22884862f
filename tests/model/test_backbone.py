"""Grouping, stacking and unrolling layers changes neither their order nor their numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import load
from jaxtml.model.backbone import Backbone
from jaxtml.model.spec import count_parameters, flatten, init_params
from jaxtml.model.stack import LayerKind

TINY = load("tiny").backbone
SMALL = dataclasses.replace(TINY, d_model=24, d_ff_dense=32, d_ff_expert=16)


def _make_backbone(n_layers: int, n_dense: int, global_layers: tuple[int, ...]) -> Backbone:
    return Backbone(dataclasses.replace(SMALL, n_layers=n_layers, n_dense=n_dense, global_layers=global_layers))


SHAPES = {
    "one layer": (1, 0, ()),
    "tiny": (6, 2, (2, 5)),
    "Inkling-Small": (42, 2, (5, 11, 17, 23, 29, 35, 41)),
    "276B": (44, 2, (5, 11, 17, 23, 29, 35, 41)),
    "no regularity": (7, 1, (1, 2, 5)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_has_one_place_and_its_own_kind(shape):
    n_layers, n_dense, global_layers = SHAPES[shape]
    backbone = _make_backbone(*SHAPES[shape])
    kinds = backbone.kinds()
    assert kinds == [LayerKind(i in global_layers, i >= n_dense) for i in range(n_layers)]
    places = [
        backbone.layer_index(b, r, i, j)
        for b, block in enumerate(backbone.blocks)
        for i in range(block.repeats)
        for r, run in enumerate(block.runs)
        for j in range(run.layers)
    ]
    assert places == list(range(n_layers))


def test_inkling_small_compiles_as_five_layer_bodies():
    backbone = _make_backbone(42, 2, tuple(range(5, 42, 6)))
    assert sum(len(block.runs) for block in backbone.blocks) == 5


def test_layers_run_in_the_order_in_which_they_are_unstacked():
    backbone = _make_backbone(8, 2, (2, 5))
    params = init_params(backbone.specs(), 0)
    layers = backbone.prepare_for_serving(params)
    for b, block in enumerate(backbone.blocks):
        for r, run in enumerate(block.runs):
            for i in range(block.repeats):
                for j in range(run.layers):
                    index = backbone.layer_index(b, r, i, j)
                    stacked = params[f"block{b}"][f"run{r}"]["attn"]["wq"][i, j]
                    np.testing.assert_array_equal(layers[index]["attn"]["wq"], stacked)


@pytest.mark.parametrize("remat", ["outputs", "full"])
def test_computing_layers_again_backwards_changes_no_gradient(remat):
    backbone = _make_backbone(3, 1, (1,))
    params = init_params(backbone.specs(), 0)
    x = jax.random.normal(jax.random.key(0), (2, 40, SMALL.d_model))

    def gradient(remat: str):
        return jax.jit(jax.grad(lambda p: (backbone.forward(p, x, remat=remat)[0] ** 2).mean()))(params)

    for (path, kept), (_, again) in zip(flatten(gradient("none")), flatten(gradient(remat)), strict=True):
        np.testing.assert_allclose(kept, again, rtol=1e-4, atol=1e-7, err_msg=path)


def test_padding_at_the_end_changes_nothing_before_it():
    backbone = _make_backbone(3, 1, (1,))
    params = init_params(backbone.specs(), 0)
    x = jax.random.normal(jax.random.key(0), (1, 40, SMALL.d_model))
    padded = jnp.pad(x, ((0, 0), (0, 25), (0, 0)), constant_values=3.0)
    kind = (jnp.arange(65) < 40).astype(jnp.int32)[None]
    plain, stats = backbone.forward(params, x)
    longer, padded_stats = backbone.forward(params, padded, kind)
    np.testing.assert_allclose(plain, longer[:, :40], rtol=2e-5, atol=1e-6)
    for a, b in zip(stats, padded_stats, strict=True):
        np.testing.assert_array_equal(a.load, b.load)
        np.testing.assert_allclose(a.z_loss, b.z_loss, rtol=1e-5)


def test_bfloat16_stays_near_float32():
    backbone = _make_backbone(3, 1, (1,))
    params = init_params(backbone.specs(), 0)
    x = jax.random.normal(jax.random.key(0), (2, 40, SMALL.d_model))
    exact, _ = backbone.forward(params, x)
    rounded, _ = backbone.forward(params, x.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.03


def test_the_router_bias_is_the_only_parameter_that_is_not_trained():
    table = Backbone(TINY).specs()
    assert {path.split("/")[-1] for path, spec in flatten(table) if not spec.trained} == {"router_bias"}
    total, active = count_parameters(table)
    assert active < total
