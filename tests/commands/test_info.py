"""`jaxtml info` counts parameters without making them, and names what is wrong with a config."""

from __future__ import annotations

import json

import pytest


def test_info_counts_parameters_by_group(jaxtml):
    status, out, _ = jaxtml("info", "tiny", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["params_total"] <= 12_000_000
    assert report["params_total"] == sum(group["total"] for group in report["groups"].values())
    assert report["params_active"] < report["params_total"]
    assert report["config"]["backbone"]["d_model"] == 192


def test_info_says_what_a_session_takes_and_sees(jaxtml):
    """A retained token takes as much as a token of the window: keys and values of two layers, and four bytes."""
    _, out, _ = jaxtml("info", "tiny")
    assert out.splitlines()[-1].endswith("and sees its last 256 tokens, and before them 2,048 tokens of text")
    sizes = []
    for retained in (100, 200):
        _, out, _ = jaxtml("info", "tiny", "--json", "--set", f"backbone.global_.retained={retained}")
        sizes.append(json.loads(out)["session_bytes"])
    assert sizes[1] - sizes[0] == 100 * (2 * 2 * 2 * 48 * 4 + 4)
    _, out, _ = jaxtml("info", "tiny", "--set", "backbone.global_.retained=200")
    assert "sees its last 256 tokens, and before them 200 tokens of text" in out


def test_set_overrides_a_field(jaxtml):
    _, out, _ = jaxtml("info", "tiny", "--json", "--set", "backbone.n_experts=16")
    _, before, _ = jaxtml("info", "tiny", "--json")
    assert json.loads(out)["config"]["backbone"]["n_experts"] == 16
    assert json.loads(out)["params_total"] > json.loads(before)["params_total"]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("tml_interaction_small", (276e9, 0.005), (12e9, 0.04)), ("inkling_small", (263.85e9, 0.001), (11.2e9, 0.01))],
)
def test_info_counts_the_large_models_without_their_weights(jaxtml, name, total, active):
    status, out, _ = jaxtml("info", name, "--json")
    report = json.loads(out)
    assert status == 0
    for key, (expected, tolerance) in (("params_total", total), ("params_active", active)):
        assert abs(report[key] / expected - 1) <= tolerance, (key, report[key])
    assert {"routed experts", "shared experts", "attention", "towers", "flow head"} <= report["groups"].keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nosuch",), "no config 'nosuch', and no such directory: give one of"),
        (("gs://bucket/run",), "argument CONFIG: gs://bucket/run is an address"),
        (("/dev/null",), "/dev/null is a file: name the directory of the checkpoint, or a config"),
        (("no/such",), "there is no directory no/such: name the directory of a checkpoint, or a config"),
        (("README.md",), "README.md is a file: name the directory of the checkpoint"),
        (("tiny", "--set", "backbone.depth=3"), "no field 'depth'"),
        (("tiny", "--set", "train.steps=soon"), "'soon' is not int"),
        (("tiny", "--set", "train.steps"), "path.to.field=value"),
        (("tiny", "--set", "backbone.experts_per_token=9"), "there are 8 experts"),
    ],
)
def test_info_refuses_a_bad_config(refusal, argv, message):
    assert message in refusal("info", *argv)
