"""Many processes, one program: how a process finds the others. Called by `train` and by the server's workers."""

from __future__ import annotations

import os
import socket

import jax

from jaxtml.errors import InputError

# Set by Slurm inside a step, and by GKE on TPU pods of several hosts: JAX finds the rest by itself.
FOUND_BY_JAX = ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
_SLICES = (("NUM_SLICES", "1"), ("SLICE_ID", "0"))


def process_rank() -> int | None:
    """Which process of its job this one is, before it joins it; None where it is alone.

    Raises:
      InputError: as `join`.
    """
    count, place = _place()
    return place if count > 1 else None


def first_host() -> str:
    """The host of process 0, by which the others reach it, as told on process 0."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS") or ""
    told = address.rpartition(":")[0] if address.rpartition(":")[2].isdecimal() else address
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return told.strip("[]") or os.environ.get("SLURMD_NODENAME") or names[0] or socket.gethostname()


def join_processes() -> None:
    """Joins the processes of this job; does nothing where there is but one.

    With JAX_COORDINATOR_ADDRESS set, NNODES and NODE_RANK say how many processes there are and which one this is (JAX
    reads no variable for these); inside a Slurm step and where GKE starts the hosts of a TPU pod, JAX finds them.

    Raises:
      InputError: the variables are incomplete or wrong.
    """
    if process_rank() is None:
        return
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(address, *_told())
    else:
        jax.distributed.initialize()


def _place() -> tuple[int, int]:
    """How many processes the job has, and which one this is."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _told()
    if os.environ.get("SLURM_STEP_NODELIST"):
        count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
        return int(count), int(os.environ.get("SLURM_PROCID", "0"))
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    slices, at = (int(os.environ.get(f"MEGASCALE_{name}", default)) for name, default in _SLICES)
    return hosts * slices, hosts * at + int(os.environ.get("TPU_WORKER_ID", "0"))


def _told() -> tuple[int, int]:
    """How many processes there are, and which one this is."""
    try:
        count, rank = (int(os.environ[name]) for name in ("NNODES", "NODE_RANK"))
    except (KeyError, ValueError) as error:
        raise InputError("JAX_COORDINATOR_ADDRESS is set: set NNODES and NODE_RANK to integers too") from error
    if not 0 <= rank < count:
        raise InputError(f"NODE_RANK={rank} with NNODES={count}: give 0 to {count - 1}")
    return count, rank
