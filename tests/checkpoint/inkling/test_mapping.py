"""Each released tensor is one layer of one parameter, and a conversion from its layout to ours can be undone."""

from __future__ import annotations

import numpy as np

from jaxtml.checkpoint.inkling.mapping import released_tensors
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import flatten


def test_names_are_unique_and_every_change_of_layout_can_be_undone(config):
    names = set()
    for tensor in released_tensors(config):
        layout = tensor.layout
        assert tensor.name not in names
        names.add(tensor.name)
        released = np.arange(np.prod(layout.shape)).reshape(layout.shape)
        ours = layout.load(released)
        assert ours.shape == tensor.spec.shape[tensor.spec.stacked :]
        np.testing.assert_array_equal(ours.transpose(layout.order).reshape(layout.shape), released)


def test_only_what_inkling_lacks_is_not_in_the_released_layout(config):
    ours = {path.split("/")[0] for path, spec in flatten(InteractionModel(config).specs()) if spec.released is None}
    assert ours == {"clock", "own", "flow", "draft", "vocoder"}


def test_gate_and_up_rows_alternate_in_released_weights(config):
    layout = next(t for t in released_tensors(config) if t.name.endswith("w13_dn.weight")).layout
    ours = layout.load(np.arange(np.prod(layout.shape)).reshape(layout.shape))
    columns = layout.shape[1]
    first_gate_rows = np.arange(columns) + 2 * columns * np.arange(3)[:, None]
    np.testing.assert_array_equal(ours[:, 0, :3].T, first_gate_rows)
    np.testing.assert_array_equal(ours[:, 1, :3].T, first_gate_rows + columns)
