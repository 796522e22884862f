"""Text that is guessed ahead and verified in one pass: the same tokens as one by one, in fewer passes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxtml.model.duplex.programs import Duplex
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import init_params
from tests.model.duplex.running import Run, assert_same, mixed_inputs, run_step, two_layers

BATCH = 4


def run_drafted(small: Any, draft: int, temperature: float) -> Run:
    """Runs the same sessions with `draft` guesses. The drafter is set to expect the last token again."""
    config = two_layers(small, flow_steps=1, draft=draft, temperature=temperature, max_text=5)
    duplex = Duplex(InteractionModel(config), trace=True)
    specs = duplex.model.specs()
    drafter = specs.pop("draft", {})
    values = init_params(specs, 0)
    if draft:
        values["draft"] = jax.tree.map(np.zeros_like, init_params({"draft": drafter}, 0)["draft"])
    params = jax.jit(duplex.prepare)(values)
    inputs = mixed_inputs(duplex, BATCH, 20, (0,) * BATCH)
    return run_step(duplex.compiled(params, BATCH), params, duplex.init_state(BATCH, 1), inputs)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guessed_text_gives_the_tokens_of_one_pass_per_token_in_fewer_passes(small, temperature):
    one_by_one, guessed = run_drafted(small, 0, temperature), run_drafted(small, 3, temperature)
    assert_same(one_by_one.outputs, guessed.outputs, exact=False)
    before, after = (np.array([out.passes for out in run.outputs]) for run in (one_by_one, guessed))
    count = np.array([out.count for out in guessed.outputs])
    spoke = np.array([out.speaking for out in guessed.outputs])
    np.testing.assert_array_equal(before, count + spoke)
    assert (after <= before).all() and (after < before).any(), "no guess was right"
    wrong = after > (count > 0) + np.ceil((count - 1) / 4) + spoke
    assert wrong.any(), "no guess was wrong"


def test_state_after_guesses_is_that_of_one_pass_per_token(small):
    one_by_one, guessed = run_drafted(small, 0, 0.0).state, run_drafted(small, 3, 0.0).state
    kept = small.backbone.conv_kernel - 1
    for a, b in zip(jax.tree.leaves(one_by_one.layers), jax.tree.leaves(guessed.layers), strict=True):
        if a.shape != b.shape:  # the tails of the convolutions keep three more inputs, to take guesses back
            b = b[:, -kept:]
            np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_array_equal(one_by_one.position, guessed.position)
    np.testing.assert_array_equal(one_by_one.own_frames, guessed.own_frames)
