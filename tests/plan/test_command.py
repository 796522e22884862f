"""A plan compiles the trainer's own step; where libtpu is not installed it says so in one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxtml import config as configs
from jaxtml.errors import InputError
from jaxtml.model.flops import train_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import work_of
from jaxtml.plan import command
from jaxtml.plan.programs import train_program

LIBTPU = importlib.util.find_spec("libtpu") is not None
KEYS = {"chips", "bytes_per_chip", "chip_memory_bytes", "flops_per_chip", "flops_ratio", "collective_bytes",
        "roofline_step_ms", "tokens_per_s_per_chip", "mfu"}  # fmt: skip


def test_the_large_models_step_needs_little_more_than_its_tokens_do():
    """FLOPs with loop trip counts at 4,096 tokens a chip, everything but a layer's input computed again backwards."""
    shape = MeshShape(data=16, expert=8)
    config = configs.load("tml_interaction_small", ["train.batch=128", "train.capacity=1.1"])
    axes = (AxisType.Explicit,) * 4
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(shape.sizes.values()), tuple(shape.sizes), axes)):
        program = train_program(config, shape)
        work = work_of(program.function, *program.arguments, platform="tpu")
    needed = train_flops_per_token(config) * config.data.tokens
    assert work.open_loops == 0
    assert 4 / 3 <= work.flops / needed < 1.1 * 4 / 3
    # Each layer's weights are gathered over `data` twice, their gradients scattered once.
    gathered, scattered = (work.sent[kind, ("data",)] for kind in ("all_gather", "reduce_scatter"))
    assert gathered == pytest.approx(2 * scattered, rel=1e-3)


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_libtpu_a_plan_is_refused_in_one_line():
    with pytest.raises(InputError, match="libtpu gives no such devices") as refused:
        command.plan(configs.load("tiny"), "v5e:2x2", None, "train")
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu (pip install -e .[plan])")
def test_a_small_model_is_compiled_for_a_pod_that_is_not_here(tmp_path):
    """In a process of its own: the compiler stays in the one that it was loaded into."""
    tiny = configs.load("tiny")
    small = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, compute_dtype="bfloat16"))
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(small))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jaxtml",
            "plan",
            str(path),
            "--topology",
            "v5e:2x4",
            "--mesh",
            "data=4,expert=2",
            "--json",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report.keys() >= KEYS
    assert 0 < report["bytes_per_chip"] < report["chip_memory_bytes"]
    assert report["chips"] == 8 and report["flops_ratio"] >= 1
