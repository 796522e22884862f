"""Many processes, one program: how a process finds the others. Called by `train` and by the server's workers."""

from __future__ import annotations

import os

import jax

from jaxtml.errors import InputError

# Set by Slurm inside a step, and by GKE on TPU pods of several hosts: JAX finds the rest by itself.
FOUND_BY_JAX = ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")


def rank() -> int | None:
    """Which process of its job this one is, before it joins it; None where it is alone.

    Raises:
      InputError: as `join`.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _told()[1]
    if os.environ.get("SLURM_STEP_NODELIST"):
        return int(os.environ.get("SLURM_PROCID", "0"))
    if any(os.environ.get(name) for name in FOUND_BY_JAX):
        hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
        return int(os.environ.get("MEGASCALE_SLICE_ID", "0")) * hosts + int(os.environ.get("TPU_WORKER_ID", "0"))
    return None


def join() -> None:
    """Joins the processes of this job; does nothing where there is but one.

    With JAX_COORDINATOR_ADDRESS set, NNODES and NODE_RANK say how many processes there are and which one this is (JAX
    reads no variable for these); inside a Slurm step and where GKE starts the hosts of a TPU pod, JAX finds them.

    Raises:
      InputError: the variables are incomplete or wrong.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        jax.distributed.initialize(address, *_told())
    elif any(os.environ.get(name) for name in FOUND_BY_JAX):
        jax.distributed.initialize()


def _told() -> tuple[int, int]:
    """How many processes there are, and which one this is."""
    try:
        count, rank = (int(os.environ[name]) for name in ("NNODES", "NODE_RANK"))
    except (KeyError, ValueError) as error:
        raise InputError("JAX_COORDINATOR_ADDRESS is set: set NNODES and NODE_RANK to integers too") from error
    if not 0 <= rank < count:
        raise InputError(f"NODE_RANK={rank} with NNODES={count}: give 0 to {count - 1}")
    return count, rank
