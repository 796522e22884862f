"""A process finds its rank and the first host in the variables that job schedulers set, and joins the others."""

from __future__ import annotations

import socket

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


JOB = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
POD = {"TPU_WORKER_HOSTNAMES": "a-0,a-1"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**JOB, "SLURM_PROCID": ""}, "SLURM_PROCID is not set: start the command with srun, or unset"),
        ({**JOB, "SLURM_JOB_ID": "7"}, "SLURM_LOCALID is not set: start the command with srun, or unset"),
        ({**JOB, "SLURM_STEP_NUM_TASKS": "2(x2)"}, r"SLURM_STEP_NUM_TASKS=2\(x2\) is not a whole number"),
        ({**JOB, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 is not below SLURM_NTASKS=4"),
        ({**POD, "TPU_WORKER_ID": "x"}, "TPU_WORKER_ID=x is not a whole number: set it as GKE does, or unset"),
        (POD, "TPU_WORKER_ID is not set"),
        ({**POD, "TPU_WORKER_ID": "2"}, "TPU_WORKER_ID=2, but TPU_WORKER_HOSTNAMES has 2 names"),
        ({"TPU_WORKER_HOSTNAMES": "a-0,", "TPU_WORKER_ID": "0"}, "TPU_WORKER_HOSTNAMES=a-0, has an empty name"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES=two is not"),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID=2 is not below"),
        ({"JAX_COORDINATOR_ADDRESS": "h", "NNODES": "2", "NODE_RANK": "0"}, "=h: write host:port, .* h:9876"),
        ({"JAX_COORDINATOR_ADDRESS": "h:x", "NNODES": "2", "NODE_RANK": "0"}, "=h:x: write host:port"),
        (
            {"JAX_COORDINATOR_ADDRESS": "http://h:99", "NNODES": "2", "NODE_RANK": "0"},
            "=http://h:99: write host:port, without http://",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1"},
            "does not find the others: set JAX_COORDINATOR_ADDRESS .* NODE_RANK=1",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE=4 .* set JAX_COORD"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 and RANK=0 are those of a job of 2 processes"),
        ({"JAX_COORDINATOR_ADDRESS": "h:70000", "NNODES": "2", "NODE_RANK": "0"}, "=h:70000: write host:port"),
    ],
)
def test_a_scheduler_whose_variables_are_partial_or_odd_is_named_with_the_remedy(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as refused:
        processes.join_processes()
    assert "\n" not in str(refused.value)


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def test_the_variables_that_a_refused_launcher_is_told_to_set_are_enough(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refused:
        processes.process_rank()
    assert "JAX_COORDINATOR_ADDRESS to a:port, a free port of a, NNODES=2, NODE_RANK=1 and, on GPUs, " in str(
        refused.value
    )
    assert "JAX_LOCAL_DEVICE_IDS=1; for a single process unset WORLD_SIZE and RANK" in str(refused.value)
    for name, value in {"JAX_COORDINATOR_ADDRESS": "a:99", "NNODES": "2", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.process_rank() == 1 and processes.first_host() == "a"


@pytest.mark.parametrize("other", [{"NNODES": "1", "NODE_RANK": "0"}, JOB, {**POD, "TPU_WORKER_ID": "1"}])
def test_variables_of_a_launcher_are_ignored_where_jax_finds_the_processes(other, monkeypatch):
    for name, value in {**TORCHRUN, "JAX_COORDINATOR_ADDRESS": "a:99" if "NNODES" in other else "", **other}.items():
        monkeypatch.setenv(name, value)
    assert processes.process_rank() == (None if "NNODES" in other else 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("JAX_COORDINATOR_ADDRESS", *other):
        monkeypatch.delenv(name, raising=False)
    assert processes.process_rank() is None


def test_a_job_that_jax_does_not_recognise_is_refused_with_the_remedy(monkeypatch):
    def fail() -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    for name, value in {"MEGASCALE_COORDINATOR_ADDRESS": "a", "MEGASCALE_NUM_SLICES": "2"}.items():
        monkeypatch.setenv(name, value)
    remedy = "set JAX_COORDINATOR_ADDRESS, NNODES=2 and NODE_RANK=0, or unset MEGASCALE_COORDINATOR_ADDRESS"
    with pytest.raises(InputError, match=f"does not find the 2 processes that MEGASCALE_COORD.*: {remedy}"):
        processes.join_processes()


def test_processes_that_do_not_find_each_other_are_refused_in_one_line(monkeypatch):
    def fail(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\n# of tasks: 1/2")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(processes, "_WAIT_S", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, value in {"JAX_COORDINATOR_ADDRESS": address, "NNODES": "2", "NODE_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        refused = f"process 1 of 2 cannot join the others at {address}: start all 2 processes"
        with pytest.raises(InputError, match=f"{refused}.*DEADLINE"):
            processes.join_processes()
        monkeypatch.setenv("NODE_RANK", "0")
        with pytest.raises(InputError, match=f"{address}: another program uses port .* name a free port"):
            processes.join_processes()
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(InputError, match=f"{refused}.*refused"):
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
