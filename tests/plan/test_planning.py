"""A plan compiles the trainer's own step or the server's micro-turn; without a compiler it fails with one line."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jaxtml import config as configs
from jaxtml.errors import InputError
from jaxtml.model.duplex.grammar import max_generated
from jaxtml.model.duplex.state import NARROW_PREFILL, wide_prefill
from jaxtml.model.flops import train_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import count_jaxpr_work
from jaxtml.plan import planning
from jaxtml.plan.micro_turn import Turn
from jaxtml.plan.mix import DEFAULT, Mix
from jaxtml.plan.planning import Plan, make_plan, measure_serving_load, usual_serving_mesh
from jaxtml.plan.programs import device_bytes, make_serving_program, make_training_program, trace_program
from jaxtml.plan.real_time import TooSlow, check_real_time, longest_ms
from jaxtml.plan.report import time_course
from jaxtml.plan.topology import Topology
from tests.plan.compilers import CUDA, LIBTPU, ROOT, environment

MESH_8 = MeshShape(expert=2, tensor=4)
KEYS = {"chips", "bytes_per_chip", "chip_memory_bytes", "flops_per_chip", "flops_ratio", "collective_bytes",
        "roofline_step_ms", "tokens_per_s_per_chip", "mfu"}  # fmt: skip
NEEDS_LIBTPU = pytest.mark.skipif(not LIBTPU, reason="needs libtpu (pip install -e '.[plan]')")
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs jax-cuda12-plugin and tokamax (pip install -e '.[plan-cuda]')")


def test_the_step_of_the_large_model_needs_little_more_work_than_its_tokens():
    """Counts FLOPs for 4,096 tokens per chip, with all of a layer computed again in the backward pass.

    Capacity adds a tenth to the work of the experts, and the drafter adds two percent to all.
    """
    shape = MeshShape(data=16, expert=8)
    config = configs.load("tml_interaction_small", ["train.batch=128", "train.capacity=1.1"])
    _, jaxpr = trace_program(partial(make_training_program, config, shape), shape)
    work = count_jaxpr_work(jaxpr, "tpu")
    needed = train_flops_per_token(config) * config.data.tokens
    assert work.open_loops == 0
    assert 4 / 3 <= work.flops / needed < 1.12 * 4 / 3
    # Each layer's weights are gathered over `data` twice, and their gradients are scattered once.
    gathered, scattered = (work.sent[kind, ("data",)] for kind in ("all_gather", "reduce_scatter"))
    assert gathered == pytest.approx(2 * scattered, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_a_plan_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"no compiler for it here \(pip install libtpu\)") as refused:
        make_plan(Plan(configs.load("tiny"), "train", Mix.read(DEFAULT)), "v5e:2x2", None)
    assert "\n" not in str(refused.value)


# Two layers, no pictures, rows of five seconds: the compilers for chips take three times as long for all of tiny.
SHORT_TINY = (
    *("train.compute_dtype=bfloat16", "serve.compute_dtype=bfloat16", "data.turns=25", "data.tokens=256"),
    "duplex.max_patches=0",
    *("backbone.n_layers=2", "backbone.n_dense=1", "backbone.global_layers=[1]", "flow.depth=1", "vocoder.depth=1"),
)


def run_plan(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `jaxtml plan` of a short tiny, in its own process: a process keeps the compiler that it has loaded."""
    tiny = configs.load("tiny", SHORT_TINY)
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
    done = run_plan(
        tmp_path, "--topology", "v5e:1x1", "--program", "serve", "--slow-too", "--set", "serve.sessions=40000"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        "does not fit v5e:1x1, a device has 15.75G and would need " in done.stderr
        and "fewer serve.sessions" in done.stderr
    )


def test_serving_the_large_model_holds_each_weight_once_and_reads_the_experts_that_it_needs():
    """Traces the program of eight chips with 32 sessions: what a device holds, and what it multiplies in a round."""
    config = configs.load("tml_interaction_small")
    load = measure_serving_load(config, Topology.parse("v5p:2x2x2"), MESH_8)
    routed = 42 * 256 * 3 * 4096 * 2048 * 2
    assert load.experts == routed / 8
    assert load.state > 32 * 7 * 32_768 * 2 * 1024 * 2 / 8  # keys and values of global layers alone
    program = load.program
    assert load.max_written == max_generated(config.duplex) - 1
    assert program.narrow.positions == NARROW_PREFILL and program.wide.positions == wide_prefill(config.duplex)
    # A position has six choices of expert in each of 42 layers, and a device multiplies at most a block of eight rows
    # for each choice of its experts. A dense product would multiply 128 experts for each position. `rows` is the FLOPs
    # of a round, divided by the FLOPs of one row with a quarter of one expert in each layer. The round also has
    # attention and all other parts.
    rows = program.writing.flops / (2 * 42 * 3 * 4096 * 2048 / 4)
    choices = 32 * program.round_positions * 6 / 2
    assert choices < rows < 16 * choices
    # All weights but the vision tower, flow head, drafter, vocoder and most rows of the embedding are read once.
    arguments, _ = trace_program(partial(make_serving_program, config, MESH_8, "tpu"), MESH_8)
    unread = device_bytes([arguments[0][name] for name in ("embed", "visual", "flow", "draft", "vocoder")])
    assert program.narrow.read == pytest.approx(load.weights - unread, rel=0.01)


@pytest.mark.parametrize("sessions", [32, 40])
def test_a_pass_of_the_large_model_on_32_chips_has_few_collectives(sessions):
    config = configs.load("tml_interaction_small", [f"serve.sessions={sessions}"])
    load = measure_serving_load(config, Topology.parse("v6e:4x8"), MeshShape(expert=8, tensor=4))
    for work in (load.program.narrow, load.program.writing, load.program.speech):
        assert 2 * 44 < sum(work.calls.values()) <= 120 * sum(work.passes.values())
    assert longest_ms(config, load, Topology.parse("v6e:4x8"), MeshShape(expert=8, tensor=4)) <= 200


def test_a_server_whose_longest_micro_turn_takes_too_long_is_refused_with_what_would_do():
    config = configs.load("tml_interaction_small", ["duplex.max_heard=40", "duplex.max_text=60"])
    mesh, v6e = MeshShape(expert=8, tensor=4), Topology.parse("v6e:4x8")
    with pytest.raises(TooSlow) as refused:
        check_real_time(config, v6e, mesh, measure_serving_load, lambda _, place: MeshShape(place.devices // 32, 8, 4))
    message = str(refused.value)
    assert "\n" not in message and "is not served in real time on v6e:4x8: its longest micro-turn takes" in message
    found = re.search(r"duplex.max_heard=(\d+) with duplex.max_text=(\d+) \((\d+) ms\)", message)
    assert found is not None and int(found[1]) + int(found[2]) < 100

    bounds = [f"duplex.max_heard={found[1]}", f"duplex.max_text={found[2]}"]
    changed = configs.load("tml_interaction_small", bounds)
    load = measure_serving_load(changed, v6e, mesh)
    assert longest_ms(changed, load, v6e, mesh) == pytest.approx(float(found[3]), abs=0.5) and int(found[3]) <= 200
    one_more = load.program.course(Turn(True, load.max_written + 1, True), 0)
    assert time_course(changed, load, v6e, mesh, one_more).total > 0.2


def test_a_search_says_why_not_even_the_fewest_sessions_are_served(monkeypatch):
    def refuse(plan: Plan, *_: Any) -> None:
        raise TooSlow(f"{plan.config.serve.sessions} sessions take 250 ms: try a smaller model")

    monkeypatch.setattr(planning, "_plan", refuse)
    plan = Plan(configs.load("tiny"), "serve", Mix.read(DEFAULT))
    with pytest.raises(TooSlow, match=r"^not even serve.sessions=4 will do: 4 sessions take 250 ms: try a smaller"):
        planning.search_largest_plan(plan, "v6e:2x2", "expert=4")


def test_the_usual_mesh_of_serving_shares_the_sessions_and_is_the_fastest():
    config = configs.load("tiny", ["serve.sessions=4"])
    v6e = Topology.parse("v6e:2x4")  # eight chips: with tensor=1, eight devices would have to share four sessions
    mesh = usual_serving_mesh(config, v6e)
    assert mesh == MeshShape(expert=4, tensor=2)
    assert usual_serving_mesh(config, Topology.parse("v6e:1x1")) == MeshShape()
