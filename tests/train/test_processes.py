"""Training by several processes: a run that resumes with another number of processes ends as it would have."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tones

from jaxtml import config as configs
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.config import AttentionConfig, Config
from jaxtml.data import bank
from jaxtml.data.tasks import scenarios
from jaxtml.model.spec import flatten

STEPS = 4
# One process of a run. Arguments: config, workdir, data, mesh, devices of this process, batches after which it stops.
WORKER = """
import itertools, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[5]))
from jaxtml import config
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.processes import join_processes
from jaxtml.train import feed, loop

all_batches, stop = feed.batches, int(sys.argv[6])

class FirstBatches:
    def __init__(self, batches):
        self.batches, self.left = batches, stop
    def __next__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return next(self.batches)
    def close(self):
        self.batches.close()

feed.batches = lambda *args, **options: FirstBatches(all_batches(*args, **options))
join_processes()
mesh = MeshShape.parse(sys.argv[4])
try:
    loop.train(config.load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), workers=0, mesh=mesh)
except KeyboardInterrupt:
    pass
"""


@pytest.fixture(scope="module")
def config(small) -> Config:
    """Two layers that four devices can split evenly."""
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
    """Runs `count` processes with `devices` devices each, until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(count):
        coordinator = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NNODES": str(count), "NODE_RANK": str(rank)}
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(coordinator if count > 1 else {})}
        arguments = [str(config), str(workdir), str(data), mesh, str(devices), str(stop)]
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, *arguments], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    for process in running:
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr[-3000:]


def assert_same(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Two runs have the same parameters."""
    for (path, x), (_, y) in zip(flatten(read_checkpoint(a)[1]), flatten(read_checkpoint(b)[1]), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(config, data, tmp_path):
    resolved = tmp_path / "config.json"
    resolved.write_text(configs.to_json(config))
    uninterrupted, split = tmp_path / "uninterrupted", tmp_path / "split"
    run(resolved, uninterrupted, data, 2, 2, "data=2,expert=2")
    run(resolved, split, data, 2, 2, "data=2,expert=2", stop=3)
    assert [path.name for path in (split / "checkpoints").iterdir()] == ["2"]
    for other in ("as_before", "one_process", "four_processes", "two_devices"):
        shutil.copytree(split, tmp_path / other)
    run(resolved, tmp_path / "as_before", data, 2, 2, "data=2,expert=2")
    run(resolved, tmp_path / "one_process", data, 1, 4, "data=2,expert=2")
    run(resolved, tmp_path / "four_processes", data, 4, 1, "data=2,expert=2")
    run(resolved, tmp_path / "two_devices", data, 1, 2, "data=2")
    for other in ("as_before", "one_process", "four_processes"):
        assert_same(uninterrupted, tmp_path / other)
    assert_same(uninterrupted, tmp_path / "two_devices", 1e-5)  # two devices add up the rows in another order
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("uninterrupted", "four_processes")]
    assert len(logs[0]) == len(logs[1]) == 1, "one process writes the log"
