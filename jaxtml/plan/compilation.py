"""Compiles a traced program for hardware that is not here and reads what memory it needs. Called by `planning`."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import jax

from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.plan.roofline import GIB, Memory
from jaxtml.plan.topology import Topology


def _return_memory() -> None:
    """Keeps glibc from raising, with every large array that is freed, the size up to which it holds memory back: a
    fifth of what the compiler of a large program has at its peak."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**17)  # M_MMAP_THRESHOLD; its initial value


class DoesNotFit(InputError):
    """A program needs more memory than a chip has."""


_HELPS = {
    "train": "train.remat=full, a smaller train.batch or a larger train.accumulate, train.capacity, "
    "train.moment_dtype=bfloat16",
    "serve": "fewer serve.sessions, a larger tensor in --mesh, serve.int8_experts=true",
}
_NEEDS = re.compile(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)")
_OVER = re.compile(r"[Ee]xceeded \w+ capacity by ([\d.]+\w?)")


def _compiled_memory(traced: Any, config: Config, where: Topology, program: str) -> Memory:
    """What the compiler allots. Some refuse a program that is too large, others compile it all the same."""

    def refused(how_much: str) -> DoesNotFit:
        return DoesNotFit(f"{config.name} does not fit {where}, {how_much}: try {_HELPS[program]}, or more chips")

    try:
        found = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        over, needs = _OVER.search(said), _NEEDS.search(said)
        if "RESOURCE_EXHAUSTED" not in said or not (over or needs or "HBM" in said.upper()):
            raise
        if needs is not None:
            raise refused(f"a device has {needs.group(2)} and would need {needs.group(1)}") from error
        raise refused(f"by {over.group(1)} per device" if over else f"({said[:160]})") from error
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    room = where.chip.memory / where.chip.devices
    if memory.total > room:
        raise refused(f"a device has {room / GIB:.1f} GiB and would need {memory.total / GIB:.1f}")
    return memory
