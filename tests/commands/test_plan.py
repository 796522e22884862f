"""`jaxtml plan` names what does not fit before it compiles anything."""

from __future__ import annotations

import pytest

from jaxtml.parallel.chips import CHIPS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--topology", "v9:4x4"), "no chip 'v9'; there are v5e, v5p, v6e, tpu7x"),
        (("--topology", "v5p:4x4x9"), "v5p comes as 4x4x8"),
        (("--topology", "v5p:4x4x8", "--mesh", "date=4"), "no axis 'date'"),
        (("--topology", "v6e-4", "--mesh", "data=8"), "mesh data=8 has 8 devices, and v6e:2x2 has 4: name axes whose"),
        (("--topology", "v6e-4", "--mesh", ""), "it is empty"),
        (("--topology", "v5p:4x4x8", "--set", "train.batch=100"), "train.batch 100 is not a multiple of 128"),
    ],
)
def test_plan_refuses_what_does_not_fit(refusal, argv, message):
    assert message in refusal("plan", "tml_interaction_small", *argv)


def test_plan_says_which_config_a_directory_has(refusal, checkpoint):
    assert f"takes a config: name {checkpoint}/config.json" in refusal("plan", checkpoint, "--topology", "v6e-4")


def test_the_help_lists_all_chips_and_spellings(jaxtml):
    status, out, _ = jaxtml("plan", "--help")
    words = " ".join(out.split())
    assert status == 0
    assert all(word in words for word in (*(chip.name for chip in CHIPS), "v5p-256", "v6e-16", "2xv5p:4x4x8", "8xh200"))
