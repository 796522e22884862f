"""How the processes of one job find each other, so that they run one program together.

Called by the trainer and by the server's workers. JAX itself finds the processes of a Slurm step and of a TPU pod that
GKE starts. Everywhere else, three environment variables give the address of process 0, the number of processes and the
rank of this process: JAX_COORDINATOR_ADDRESS, NNODES and NODE_RANK.
"""

from __future__ import annotations

import os
import socket

import jax

from jaxtml.errors import InputError

# Slurm sets the first variable inside a step. GKE sets the others on TPU pods of several hosts. If one of them is set,
# JAX finds the processes of the job itself.
FOUND_BY_JAX = ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
_MEGASCALE_DEFAULTS = (("NUM_SLICES", "1"), ("SLICE_ID", "0"))


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
      InputError: the variables are incomplete or wrong.
    """
    if process_rank() is None:
        return
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(address, *_position_from_variables())
    else:
        jax.distributed.initialize()


def _job_position() -> tuple[int, int]:
    """Returns the number of processes of the job and the rank of this one."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _position_from_variables()
    if os.environ.get("SLURM_STEP_NODELIST"):
        count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
        return int(count), int(os.environ.get("SLURM_PROCID", "0"))
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    slices, slice_id = (int(os.environ.get(f"MEGASCALE_{name}", default)) for name, default in _MEGASCALE_DEFAULTS)
    return hosts * slices, hosts * slice_id + int(os.environ.get("TPU_WORKER_ID", "0"))


def _position_from_variables() -> tuple[int, int]:
    """Returns the number of processes and the rank of this one from NNODES and NODE_RANK."""
    try:
        count, rank = (int(os.environ[name]) for name in ("NNODES", "NODE_RANK"))
    except (KeyError, ValueError) as error:
        raise InputError("JAX_COORDINATOR_ADDRESS is set: set NNODES and NODE_RANK to integers too") from error
    if not 0 <= rank < count:
        raise InputError(f"NODE_RANK={rank}, NNODES={count}: NODE_RANK must be at least 0 and less than NNODES")
    return count, rank
