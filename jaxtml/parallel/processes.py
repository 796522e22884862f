"""How the processes of one job find each other, so that they run one program together.

Called by the trainer and by the server's workers. JAX itself finds the processes of a Slurm step and of a TPU pod that
GKE starts. Everywhere else, three environment variables give the address of process 0, the number of processes and the
rank of this process: JAX_COORDINATOR_ADDRESS, NNODES and NODE_RANK.
"""

from __future__ import annotations

import errno
import os
import socket
import time

import jax
from absl import logging

from jaxtml.errors import InputError

# Slurm sets the first variable inside a step. GKE sets the others on TPU pods of several hosts. If one of them is set,
# JAX finds the processes of the job itself.
FOUND_BY_JAX = ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
# Pairs of variables with the number of processes and the rank, which do not help JAX to find the processes. The first
# pair is our own, set without JAX_COORDINATOR_ADDRESS. The others are those of Open MPI, MPICH and torchrun.
_OTHER_LAUNCHERS = (
    ("NNODES", "NODE_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("WORLD_SIZE", "RANK"),
)
# The number of processes on this host, and the rank of this process among them, as torchrun and Open MPI say them.
_LOCAL_RANKS = (("LOCAL_WORLD_SIZE", "LOCAL_RANK"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"))
_MEGASCALE_DEFAULTS = (("NUM_SLICES", "1"), ("SLICE_ID", "0"))
# JAX recognises a Slurm step if these variables and SLURM_STEP_NODELIST are set (jax._src.clusters.slurm_cluster).
_READ_IN_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_PROCID")
_SLURM_REMEDY = "start the command with srun, or unset SLURM_STEP_NODELIST for a single process"
_WAIT_S = 300  # how long a process waits for the others; JAX's default too
_LONGEST_CAUSE = 160  # characters of a library's error that a message repeats


def process_rank() -> int | None:
    """Returns the rank of this process in its job, also before the process joins it; None in a job of one process.

    Raises:
      InputError: as for `join_processes`.
    """
    count, rank = _job_position()
    return rank if count > 1 else None


def first_host() -> str:
    """Returns the host name or address of process 0, under which the others reach it. Call it on process 0."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS") or ""
    host = address.rpartition(":")[0] if address.rpartition(":")[2].isdecimal() else address
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return host.strip("[]") or os.environ.get("SLURMD_NODENAME") or hosts[0] or socket.gethostname()


def join_processes() -> None:
    """Connects this process to the other processes of its job; does nothing in a job of one process.

    With JAX_COORDINATOR_ADDRESS, the variables NNODES and NODE_RANK must be set too, because JAX reads no variable for
    the number of processes and the rank. Inside a Slurm step and on a TPU pod of GKE, JAX finds the processes itself.

    Raises:
      InputError: the variables are incomplete or wrong, or the processes do not find each other.
    """
    count, rank = _job_position()
    if count == 1:
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address and os.environ.get("SLURM_STEP_NODELIST"):
        for name in _READ_IN_SLURM:
            _whole_number(name, "", _SLURM_REMEDY)
    logging.info("process %d of %d: waiting for the others, at most %d s", rank, count, _WAIT_S)
    if address and rank == 0:
        _check_port(address)
    elif address:
        _wait_for_first_process(address, rank, count)
    try:
        if address:
            jax.distributed.initialize(address, count, rank)
        else:
            jax.distributed.initialize()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:_LONGEST_CAUSE]
        if isinstance(error, ValueError) and not address:
            name = next(name for name in FOUND_BY_JAX if os.environ.get(name))
            raise InputError(
                f"JAX does not find the {count} processes that {name} announces ({cause}): set "
                f"JAX_COORDINATOR_ADDRESS, NNODES={count} and NODE_RANK={rank}, or unset {name} for a single process"
            ) from error
        raise _not_joined(address, rank, count, cause) from error


def _check_port(address: str) -> None:
    """Raises `InputError` if another program listens on the port of `address`: JAX would crash on it."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS={address}: another program uses port {port} of {host}: name a free port"
            ) from error


def _wait_for_first_process(address: str, rank: int, count: int) -> None:
    """Returns when process 0 answers at `address`. JAX itself would abort the process if nobody answers.

    Raises:
      InputError: process 0 does not answer within `_WAIT_S`.
    """
    host, _, port = address.rpartition(":")
    deadline_s = time.monotonic() + _WAIT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:  # nobody listens there yet, or its name is not known yet
            if time.monotonic() > deadline_s:
                raise _not_joined(address, rank, count, str(error)) from error
        time.sleep(0.2)


def _not_joined(address: str | None, rank: int, count: int, cause: str) -> InputError:
    """Returns the error of a process that does not find the others. `cause` is what a library says."""
    place = f" at {address}" if address else ""
    return InputError(
        f"process {rank} of {count} cannot join the others{place}: start all {count} processes within {_WAIT_S} s of "
        f"each other, and let each reach the host and port of process 0 ({cause})"
    )


def _job_position() -> tuple[int, int]:
    """Returns the number of processes of the job and the rank of this one."""
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _position_from_variables(address)
    if os.environ.get("SLURM_STEP_NODELIST"):
        return _position_in_slurm()
    if not any(os.environ.get(name) for name in FOUND_BY_JAX):
        _check_other_launchers()
    return _position_in_pod()


def _check_other_launchers() -> None:
    """Raises `InputError` if another launcher has started several processes, and they would not find each other.

    Each of them would then be a job of its own, and all would write the same files.
    """
    for count_name, rank_name in _OTHER_LAUNCHERS:
        count, rank = os.environ.get(count_name, ""), os.environ.get(rank_name, "")
        if count.isdecimal() and int(count[:18]) > 1 and rank:
            raise InputError(
                f"{count_name}={count} and {rank_name}={rank} are those of a job of {count} processes, and jaxtml does "
                f"not find the others: set {_variables_to_set(count, rank)}; for a single process unset {count_name} "
                f"and {rank_name}"
            )


def _variables_to_set(count: str, rank: str) -> str:
    """Returns a phrase: the variables that let this process of another launcher find the others."""
    # torchrun listens on MASTER_PORT itself, so JAX needs another port of that host.
    host = os.environ.get("MASTER_ADDR", "")
    port = f", a free port of {host}" if host else " of process 0"
    address = f"JAX_COORDINATOR_ADDRESS to {host or 'host'}:port{port}"
    for local_count, local_rank in _LOCAL_RANKS:
        number = os.environ.get(local_rank, "")
        if os.environ.get(local_count, "1") != "1" and number:  # else all processes of the host take all of its GPUs
            return f"{address}, NNODES={count}, NODE_RANK={rank} and, on GPUs, JAX_LOCAL_DEVICE_IDS={number}"
    return f"{address}, NNODES={count} and NODE_RANK={rank}"


def _position_from_variables(address: str) -> tuple[int, int]:
    """Returns the number of processes and the rank of this one from NNODES and NODE_RANK."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise InputError(f"JAX_COORDINATOR_ADDRESS={address}: write host:port, without {address.split('://')[0]}://")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise InputError(f"JAX_COORDINATOR_ADDRESS={address}: write host:port, for example {host or address}:9876")
    try:
        count, rank = (int(os.environ[name]) for name in ("NNODES", "NODE_RANK"))
    except (KeyError, ValueError) as error:
        raise InputError("JAX_COORDINATOR_ADDRESS is set: set NNODES and NODE_RANK to integers too") from error
    if not 0 <= rank < count:
        raise InputError(f"NODE_RANK={rank}, NNODES={count}: NODE_RANK must be at least 0 and less than NNODES")
    return count, rank


def _position_in_slurm() -> tuple[int, int]:
    """Returns the number of tasks of this Slurm step and the rank of this task."""
    counted_by = "SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count = _whole_number(counted_by, "1", _SLURM_REMEDY)
    if count <= 1:
        return 1, 0
    rank = _whole_number("SLURM_PROCID", "", _SLURM_REMEDY)
    if rank >= count:
        raise InputError(f"SLURM_PROCID={rank} is not below {counted_by}={count}: {_SLURM_REMEDY}")
    return count, rank


def _position_in_pod() -> tuple[int, int]:
    """Returns the number of hosts in all slices of a TPU pod and the rank of this host; (1, 0) outside of a pod."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(names) > 1 and not all(name.strip() for name in names):
        raise InputError(f"TPU_WORKER_HOSTNAMES={','.join(names)} has an empty name: give all hosts of the slice")
    remedy = "set it as GKE does, or unset TPU_WORKER_HOSTNAMES and MEGASCALE_COORDINATOR_ADDRESS for a single process"
    slices, slice_id = (_whole_number(f"MEGASCALE_{name}", default, remedy) for name, default in _MEGASCALE_DEFAULTS)
    if slice_id >= max(slices, 1):
        raise InputError(f"MEGASCALE_SLICE_ID={slice_id} is not below MEGASCALE_NUM_SLICES={slices}: {remedy}")
    worker = _whole_number("TPU_WORKER_ID", "0" if len(names) == 1 else "", remedy)
    if worker >= len(names) and len(names) * slices > 1:
        raise InputError(f"TPU_WORKER_ID={worker}, but TPU_WORKER_HOSTNAMES has {len(names)} names: {remedy}")
    return len(names) * max(slices, 1), len(names) * slice_id + worker


def _whole_number(name: str, default: str, remedy: str) -> int:
    """Returns the environment variable `name` as an integer of at least 0. `remedy` ends the error message."""
    text = os.environ.get(name) or default
    if not text.isdecimal() or len(text) > 18:
        problem = f"{name}={text} is not a whole number" if text else f"{name} is not set"
        raise InputError(f"{problem}: {remedy}")
    return int(text)
