"""A process finds its rank and the first host in the variables that job schedulers set, and joins the others."""

from __future__ import annotations

import jax
import pytest

from jaxtml.errors import InputError
from jaxtml.parallel import processes


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2"}, "set NNODES and NODE_RANK"),
        ({"NNODES": "two", "NODE_RANK": "0"}, "set NNODES and NODE_RANK to integers"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2, NNODES=2: NODE_RANK must be at least 0 and less than NNODES"),
    ],
)
def test_a_job_with_half_of_its_variables_is_refused_in_one_line(variables, message, monkeypatch):
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
def test_a_process_knows_its_rank_and_the_first_host_before_it_joins(variables, rank, host, monkeypatch):
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


def test_a_single_process_joins_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", *processes.FOUND_BY_JAX):
        monkeypatch.delenv(name, raising=False)
    processes.join_processes()
    assert jax.process_count() == 1
