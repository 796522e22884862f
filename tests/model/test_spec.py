"""Initial values, counts and both directions of the released layout follow from one declaration per parameter."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import (
    ParamSpec,
    Released,
    bind,
    count_parameters,
    flatten,
    init_params,
    linear,
    normal,
    ones,
    param,
    specs,
    stack_specs,
    zeros,
)


class Affine(nnx.Module):
    """A module like those of the model: it declares shapes and holds no data."""

    def __init__(self) -> None:
        self.w = param((3, 5), ("in", "out"), normal(0.5), released=linear("w", 3, 5))
        self.b = param((5,), ("out",), zeros)
        self.scale = param((5,), ("out",), ones, active=0.2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x @ self.w[...] + self.b[...]) * self.scale[...]


def test_the_table_has_the_shape_of_the_parameters(small, params):
    table = InteractionModel(small).specs()
    assert [path for path, _ in flatten(table)] == [path for path, _ in flatten(params)]
    for (path, spec), (_, array) in zip(flatten(table), flatten(params), strict=True):
        assert spec.shape == array.shape, path
        assert array.dtype == np.float32, path


def test_modules_hold_shapes_until_parameters_are_bound():
    module = Affine()
    assert isinstance(module.w.get_value(), jax.ShapeDtypeStruct)
    params = init_params(specs(module), 0)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(bind(module, params)(x), x @ np.asarray(params["w"]), rtol=1e-6)
    assert isinstance(module.w.get_value(), jax.ShapeDtypeStruct)


def test_initial_values_depend_only_on_seed_path_and_layer():
    table = specs(Affine())
    here = init_params({"a": table}, 1)["a"]["w"]
    np.testing.assert_array_equal(here, init_params({"a": table, "another": table}, 1)["a"]["w"])
    assert (np.asarray(here) != init_params({"a": table}, 2)["a"]["w"]).any()
    assert (np.asarray(here) != init_params({"b": table}, 1)["b"]["w"]).any()
    shallow, deep = (init_params(stack_specs(table, (n, 2), ("block", "layer")), 1) for n in (2, 3))
    np.testing.assert_array_equal(shallow["w"], deep["w"][:2])
    assert len({np.asarray(deep["w"][i, j]).tobytes() for i in range(3) for j in range(2)}) == 6


def test_initialisers_give_what_they_name():
    params = init_params({"n": ParamSpec((200, 300), ("a", "b"), normal(0.3)), **specs(Affine())}, 0)
    assert abs(np.std(params["n"]) - 0.3) < 0.005 and abs(np.mean(params["n"])) < 0.005
    assert not np.any(params["b"]) and np.all(params["scale"] == 1)


def test_stacking_puts_the_layers_in_front_of_every_shape():
    spec = stack_specs(specs(Affine()), (4, 2), ("block", "layer"))["w"]
    assert spec.shape == (4, 2, 3, 5) and spec.axes == ("block", "layer", "in", "out") and spec.stacked == 2


def test_counts_are_total_and_active():
    assert count_parameters(specs(Affine())) == (15 + 5 + 5, 15 + 5 + 1)
    assert count_parameters({"x": stack_specs(specs(Affine()), (3,), ("layer",))}) == (75, 63)


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        (Released("x", (6,)), (6,)),
        (linear("x", 4, 6), (4, 6)),
        (Released("x", (6, 1, 4), (1, 0), (6, 4)), (4, 6)),
        (Released("x", (10, 3), (2, 1, 0), (5, 2, 3)), (3, 2, 5)),
        (Released("x", (2, 10, 3), (0, 3, 2, 1), (2, 5, 2, 3)), (2, 3, 2, 5)),
    ],
)
def test_the_released_layout_is_a_bijection(released, ours):
    tensor = np.arange(np.prod(released.shape)).reshape(released.shape)
    loaded = released.load(tensor)
    assert loaded.shape == ours
    assert sorted(loaded.ravel().tolist()) == sorted(tensor.ravel().tolist())
    np.testing.assert_array_equal(loaded.transpose(released.order).reshape(released.shape), tensor)


def test_every_released_name_is_used_once_and_fits_its_shape(small):
    names = []
    for path, spec in flatten(InteractionModel(small).specs()):
        if spec.released is not None:
            names.append((path.split("/")[:3] if spec.stacked else [], spec.released.name))
            assert spec.released.load(np.empty(spec.released.shape)).shape == spec.shape[spec.stacked :], path
            assert spec.stacked == (2 if "{layer}" in spec.released.name else 0), path
    assert len({str(name) for name in names}) == len(names)


def test_a_declaration_with_the_wrong_number_of_axes_is_refused():
    with pytest.raises(ValueError, match=r"1 axes .* for shape \(2, 3\)"):
        ParamSpec((2, 3), ("a",), zeros)


def test_the_optimizer_may_touch_everything_but_the_routers_bias(small):
    frozen = {path.split("/")[-1] for path, spec in flatten(InteractionModel(small).specs()) if not spec.trained}
    assert frozen == {"router_bias"}


def test_a_config_of_any_size_is_declared_without_making_arrays(small):
    huge = dataclasses.replace(small.backbone, d_model=8192, d_ff_expert=8192, n_experts=512, n_layers=65, n_dense=1)
    total, active = count_parameters(InteractionModel(dataclasses.replace(small, backbone=huge)).specs())
    assert total > 5e12 and active < 0.02 * total
