"""Training by several processes: whatever their number when a run stops and goes on, it ends where it would have."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tones

from jaxtml import config as configs
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.config import AttentionConfig, Config
from jaxtml.data import bank
from jaxtml.data.tasks import scenarios
from jaxtml.errors import InputError
from jaxtml.model.spec import flatten
from jaxtml.parallel import processes

STEPS = 4
# One process of a run: config, folder, data, mesh, devices of this process, batches after which it stops.
WORKER = """
import itertools, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[5]))
from jaxtml import config
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.processes import join_processes
from jaxtml.train import loop

whole, stop = loop.batches, int(sys.argv[6])

class Few:
    def __init__(self, feed):
        self.feed, self.left = feed, stop
    def __next__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return next(self.feed)
    def close(self):
        self.feed.close()

loop.batches = lambda *args, **options: Few(whole(*args, **options))
join_processes()
mesh = MeshShape.parse(sys.argv[4])
try:
    loop.train(config.load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), workers=0, mesh=mesh)
except KeyboardInterrupt:
    pass
"""


@pytest.fixture(scope="module")
def config(small) -> Config:
    """Two layers that four devices can share."""
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, window=12, rel_extent=8)
    return dataclasses.replace(
        small,
        backbone=dataclasses.replace(
            small.backbone, n_layers=2, global_layers=(1,), sliding=attention, global_=attention
        ),
        duplex=dataclasses.replace(small.duplex, max_patches=0),
        data=dataclasses.replace(small.data, turns=25, tokens=128),
        train=dataclasses.replace(small.train, steps=STEPS, batch=4, checkpoint_every=2, z_loss=0.01),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory, codec) -> Path:
    folder = tmp_path_factory.mktemp("data")
    users = [bank.PlannedUtterance("user", "train", "tone:low", text) for text in tones.USER_TEXTS]
    replies = [bank.PlannedUtterance("assistant", "train", "tone:own", text) for text in scenarios.assistant_texts()]
    bank.build(folder / "bank", [users, replies], 1, tones.speak)
    codec.save(folder / "tokenizer.json")
    return folder


def run(config: Path, workdir: Path, data: Path, count: int, devices: int, mesh: str, stop: int = 99) -> None:
    """`count` processes with `devices` each, until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(count):
        joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NNODES": str(count), "NODE_RANK": str(rank)}
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(joined if count > 1 else {})}
        given = [str(config), str(workdir), str(data), mesh, str(devices), str(stop)]
        running.append(
            subprocess.Popen([sys.executable, "-c", WORKER, *given], env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, said = process.communicate(timeout=500)
        assert process.returncode == 0, said[-3000:]


def same(a: Path, b: Path, tolerance: float = 0.0) -> None:
    for (path, x), (_, y) in zip(flatten(read_checkpoint(a)[1]), flatten(read_checkpoint(b)[1]), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(config, data, tmp_path):
    resolved = tmp_path / "config.json"
    resolved.write_text(configs.to_json(config))
    straight, split = tmp_path / "straight", tmp_path / "split"
    run(resolved, straight, data, 2, 2, "data=2,expert=2")
    run(resolved, split, data, 2, 2, "data=2,expert=2", stop=3)
    assert [path.name for path in (split / "checkpoints").iterdir()] == ["2"]
    for other in ("same", "whole", "quarters", "fewer"):
        shutil.copytree(split, tmp_path / other)
    run(resolved, tmp_path / "same", data, 2, 2, "data=2,expert=2")
    run(resolved, tmp_path / "whole", data, 1, 4, "data=2,expert=2")
    run(resolved, tmp_path / "quarters", data, 4, 1, "data=2,expert=2")
    run(resolved, tmp_path / "fewer", data, 1, 2, "data=2")
    for other in ("same", "whole", "quarters"):
        same(straight, tmp_path / other)
    same(straight, tmp_path / "fewer", 1e-5)  # other devices add up other rows
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("straight", "quarters")]
    assert len(logs[0]) == len(logs[1]) == 1, "one process writes the log"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2"}, "set NNODES and NODE_RANK"),
        ({"NNODES": "two", "NODE_RANK": "0"}, "set NNODES and NODE_RANK to integers"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2: give 0 to 1"),
    ],
)
def test_a_job_that_is_told_half_is_one_clear_line(variables, message, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        processes.join_processes()


@pytest.mark.parametrize(
    ("variables", "rank", "host"),
    [
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURMD_NODENAME": "n2"}, 1, "n2"),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, None, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1", "TPU_WORKER_ID": "1"}, 1, "a-0"),
        (
            {
                "MEGASCALE_COORDINATOR_ADDRESS": "a-0.a",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "TPU_WORKER_HOSTNAMES": "b-0,b-1",
                "TPU_WORKER_ID": "0",
            },
            2,
            "a-0.a",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "[::1]:99", "NNODES": "2", "NODE_RANK": "0"}, 0, "::1"),
        ({"JAX_COORDINATOR_ADDRESS": "h:99", "NNODES": "1", "NODE_RANK": "0"}, None, None),
    ],
)
def test_a_process_knows_its_place_before_it_joins(variables, rank, host, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", *processes.FOUND_BY_JAX):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.process_rank() == rank
    if host is not None:
        assert processes.first_host() == host
    else:
        processes.join_processes()
        assert jax.process_count() == 1


def test_alone_a_process_joins_nobody(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", *processes.FOUND_BY_JAX):
        monkeypatch.delenv(name, raising=False)
    processes.join_processes()
    assert jax.process_count() == 1
