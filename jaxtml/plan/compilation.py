"""Compiles a program for hardware that this machine lacks, and reads how much memory the compiler allots.

Called by `planning`. `prepare_process` changes the configuration of JAX and of the memory allocator for the complete
process, so a plan should run in a process of its own.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.stages
from jax.extend.core import ClosedJaxpr

from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape, make_mesh
from jaxtml.plan.programs import Program
from jaxtml.plan.roofline import GIB, Memory
from jaxtml.plan.topology import Topology

_NEEDS = re.compile(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)")
_OVER = re.compile(r"[Ee]xceeded \w+ capacity by ([\d.]+\w?)")


class DoesNotFit(InputError):
    """A program needs more memory than a chip has."""


class CompiledProgram(NamedTuple):
    """A compiled program.

    Attributes:
      arguments: the shapes of its arguments.
      jaxpr: the traced program, of which the work is counted.
      memory: the memory of one device.
    """

    arguments: tuple[Any, ...]
    jaxpr: ClosedJaxpr
    memory: Memory


def compile_program(
    make_program: Callable[[], Program], topology: Topology, mesh: MeshShape, name: str, remedy: str
) -> CompiledProgram:
    """Compiles a program for a topology.

    Args:
      make_program: makes the program; called while the mesh is set.
      topology: the hardware.
      mesh: the shape of the mesh over its devices.
      name: of the config, for messages.
      remedy: what makes the program smaller, for messages.

    Raises:
      InputError: there is no compiler for the topology, or the mesh does not fit it.
      DoesNotFit: the program needs more memory than a device has.
    """
    devices = topology.find_devices()
    with jax.set_mesh(make_mesh(mesh, devices)):
        program = make_program()
        jitted = jax.jit(program.function, donate_argnums=program.donated)
        with jax.default_device(devices[0]):  # libraries of kernels ask where the program will run
            traced = jitted.trace(*program.arguments)
            memory = _compile_memory(traced, topology, name, remedy)
        # On GPUs, libraries hide matrix products in kernels. Traced for the CPU, the program has no such kernels.
        jaxpr = traced.jaxpr if topology.chip.gpu is None else jitted.trace(*program.arguments).jaxpr
    return CompiledProgram(program.arguments, jaxpr, memory)


def prepare_process() -> None:
    """Prepares this process for tracing and compiling programs for other hardware."""
    _return_freed_memory()
    jax.config.update("jax_platforms", "cpu")  # libtpu is used as a compiler: JAX must not look for its devices
    # A program for hardware that is absent could be written to the cache, but not read back.
    jax.config.update("jax_enable_compilation_cache", False)


def _return_freed_memory() -> None:
    """Keeps glibc from holding on to freed memory.

    With every large array that is freed, glibc raises the size up to which it keeps freed memory. When a large program
    is compiled, the kept memory would be a fifth of the compiler's peak memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**17)  # M_MMAP_THRESHOLD; to set it, even to its initial value, keeps it from rising


def _compile_memory(traced: jax.stages.Traced, topology: Topology, name: str, remedy: str) -> Memory:
    """Compiles a traced program and returns its memory.

    Some compilers refuse a program that is too large, others compile it all the same.

    Raises:
      DoesNotFit: the program needs more memory than a device has.
    """

    def does_not_fit(how_much: str) -> DoesNotFit:
        return DoesNotFit(f"{name} does not fit {topology}, {how_much}: try {remedy}, or more chips")

    try:
        analysis = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        over, needs = _OVER.search(message), _NEEDS.search(message)
        if "RESOURCE_EXHAUSTED" not in message or not (over or needs or "HBM" in message.upper()):
            raise
        if needs is not None:
            raise does_not_fit(f"a device has {needs.group(2)} and would need {needs.group(1)}") from error
        raise does_not_fit(f"by {over.group(1)} per device" if over else f"({message[:160]})") from error
    assert analysis is not None, "the compiler gives no memory analysis"
    memory = Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
    )
    room = topology.chip.memory / topology.chip.devices
    if memory.total > room:
        raise does_not_fit(f"a device has {room / GIB:.1f} GiB and would need {memory.total / GIB:.1f}")
    return memory
