"""A plan compiles the trainer's own step or the server's micro-turn; without a compiler it fails with one line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxtml import config as configs
from jaxtml.errors import InputError
from jaxtml.model.flops import train_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import count_work
from jaxtml.plan.planning import make_plan, measure_serving_load
from jaxtml.plan.programs import make_serving_program, make_training_program
from tests.plan.compilers import CUDA, LIBTPU, ROOT, environment

KEYS = {"chips", "bytes_per_chip", "chip_memory_bytes", "flops_per_chip", "flops_ratio", "collective_bytes",
        "roofline_step_ms", "tokens_per_s_per_chip", "mfu"}  # fmt: skip
NEEDS_LIBTPU = pytest.mark.skipif(not LIBTPU, reason="needs libtpu (pip install -e '.[plan]')")
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs jax-cuda12-plugin and tokamax (pip install -e '.[plan-cuda]')")


def test_the_step_of_the_large_model_needs_little_more_work_than_its_tokens():
    """Counts FLOPs for 4,096 tokens per chip, with all of a layer computed again in the backward pass."""
    shape = MeshShape(data=16, expert=8)
    config = configs.load("tml_interaction_small", ["train.batch=128", "train.capacity=1.1"])
    axes = (AxisType.Explicit,) * 4
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(shape.sizes.values()), tuple(shape.sizes), axes)):
        program = make_training_program(config, shape)
        work = count_work(program.function, *program.arguments, platform="tpu")
    needed = train_flops_per_token(config) * config.data.tokens
    assert work.open_loops == 0
    assert 4 / 3 <= work.flops / needed < 1.1 * 4 / 3
    # Each layer's weights are gathered over `data` twice, and their gradients are scattered once.
    gathered, scattered = (work.sent[kind, ("data",)] for kind in ("all_gather", "reduce_scatter"))
    assert gathered == pytest.approx(2 * scattered, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_a_plan_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"no compiler for it here \(pip install libtpu\)") as refused:
        make_plan(configs.load("tiny"), "v5e:2x2", None, "train")
    assert "\n" not in str(refused.value)


def run_plan(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `jaxtml plan` of tiny in bfloat16, in its own process: a process keeps the compiler that it has loaded."""
    tiny = configs.load("tiny", ["train.compute_dtype=bfloat16", "serve.compute_dtype=bfloat16"])
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(tiny))
    command = [sys.executable, "-m", "jaxtml", "plan", str(path), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)


def plan_report(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Returns the report of `run_plan`, which has to succeed."""
    done = run_plan(tmp_path, *arguments, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_report(report: dict[str, Any], chips: int) -> None:
    """Checks what is true of every plan of `chips` chips."""
    assert report.keys() >= KEYS
    assert report["chips"] == chips and report["flops_ratio"] >= 1
    assert 0 < report["bytes_per_chip"] < report["chip_memory_bytes"]


@pytest.mark.parametrize(
    ("topology", "mesh", "chips"),
    [
        pytest.param("v5e:2x4", "data=4,expert=2", 8, marks=NEEDS_LIBTPU, id="tpu"),
        pytest.param("h100:1x4", "data=2,expert=2", 4, marks=NEEDS_CUDA, id="gpu"),
    ],
)
def test_a_training_step_is_compiled_for_chips_that_are_not_here(topology, mesh, chips, tmp_path):
    report = plan_report(tmp_path, "--topology", topology, "--mesh", mesh, "--set", "train.transport=ragged")
    check_report(report, chips)
    assert any(kind.startswith("ragged_all_to_all") for kind in report["collective_bytes"])


@pytest.mark.parametrize(
    "topology", [pytest.param("v6e:2x2", marks=NEEDS_LIBTPU), pytest.param("h100:1x4", marks=NEEDS_CUDA)]
)
def test_a_micro_turn_is_compiled_for_chips_that_are_not_here(topology, tmp_path):
    report = plan_report(tmp_path, "--topology", topology, "--program", "serve")
    check_report(report, 4)
    if topology == "v6e:2x2":
        assert report["mesh"] == "expert=4" and report["sessions_at_200_ms"] > report["sessions"] == 8


@pytest.mark.slow
@NEEDS_LIBTPU
def test_a_mesh_that_is_no_product_of_the_torus_sides_is_planned_too(tmp_path):
    arguments = (
        "--topology",
        "v5e:4x4",
        "--mesh",
        "data=2,expert=8",
        "--set",
        "train.batch=16",
        "--set",
        "backbone.n_experts=8",
    )
    assert plan_report(tmp_path, *arguments)["mesh"] == "data=2,expert=8"


@NEEDS_LIBTPU
def test_a_program_that_does_not_fit_is_refused_with_what_would_help(tmp_path):
    done = run_plan(tmp_path, "--topology", "v5e:1x1", "--program", "serve", "--set", "serve.sessions=40000")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        "does not fit v5e:1x1, a device has 15.75G and would need " in done.stderr
        and "fewer serve.sessions" in done.stderr
    )


def test_serving_the_large_model_holds_each_weight_once_and_reads_the_experts_that_it_needs():
    """Traces the program of eight chips with 32 sessions: what a device holds, and what it multiplies in a round.

    A micro-turn ends with a loop. In each round of the loop, every session writes a token or speaks 50 ms.
    """
    shape = MeshShape(expert=2, tensor=4)
    config = configs.load("tml_interaction_small")
    axes = (AxisType.Explicit,) * 4
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(shape.sizes.values()), tuple(shape.sizes), axes)):
        program = make_serving_program(config, shape, "tpu")
        jaxpr = jax.jit(program.function).trace(*program.arguments).jaxpr
    load = measure_serving_load(config, shape, program.arguments, jaxpr, "tpu")
    routed = 42 * 256 * 3 * 4096 * 2048 * 2
    assert load.experts == routed / 8
    assert load.state > 32 * 7 * 32_768 * 2 * 1024 * 2 / 8  # keys and values of global layers alone
    assert load.max_rounds == 9 + 12 + 2 + 4 and load.prefill == (6, 6 + 32 + 153)
    # A device has 96 choices, and multiplies at most a block of eight rows for each choice. A dense product would
    # multiply 128 experts for each of 32 sessions. `rows_of_experts` is the FLOPs of a round, divided by the FLOPs of
    # one row with a quarter of one expert in each layer. The round also has attention and all other parts.
    rows_of_experts = load.one_round.flops / (2 * 42 * 3 * 4096 * 2048 / 4)
    assert 96 < rows_of_experts < 16 * 96
