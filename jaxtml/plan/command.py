"""`jaxtml plan`: compiles the real training step for a pod that is not here and says what it needs.

The program is the trainer's own, traced once: its work is counted on the jaxpr, its memory is what the TPU compiler
allots. Called by the command line.
"""

from __future__ import annotations

import re
from typing import Any

import jax

from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.flops import train_flops_per_token
from jaxtml.parallel.mesh import MeshShape, make_mesh
from jaxtml.parallel.work import counted
from jaxtml.plan.programs import train_program
from jaxtml.plan.report import Memory, train_report
from jaxtml.plan.topology import Topology
from jaxtml.train.step import check_batch

GIB = 2**30


def plan(config: Config, topology: str, mesh: str | None) -> dict[str, Any]:
    """The report of `report.train_report` for a config on a topology, with what it was made for.

    Raises:
      InputError: no such topology, a mesh or batch that does not fit it, or more memory than a chip has.
    """
    where = Topology.parse(topology)
    shape = MeshShape.parse(mesh) if mesh else MeshShape(data=where.devices)
    check_batch(config.train, shape)
    jax.config.update("jax_platforms", "cpu")  # libtpu is a compiler here: nobody should look for its devices
    with jax.set_mesh(make_mesh(shape, where.found())):
        program = train_program(config, shape)
        traced = jax.jit(program.function, donate_argnums=program.donated).trace(*program.arguments)
        work = counted(traced.jaxpr, "tpu")
        memory = _compiled_memory(traced, config, where)
    tokens = config.train.batch * config.data.tokens
    report = train_report(work, memory, where, tokens, train_flops_per_token(config) * tokens)
    return {"config": config.name, "topology": str(where), "mesh": str(shape), **report}


def _compiled_memory(traced: Any, config: Config, where: Topology) -> Memory:
    try:
        found = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in said and "memory" not in said.lower():
            raise
        over = re.search(r"[Ee]xceeded \w+ capacity by ([\d.]+\w?)", said)
        much = f"by {over.group(1)} per device" if over else f"({said[:160]})"
        raise InputError(
            f"{config.name} does not fit {where}, {much}: try train.remat=full, a smaller train.batch or a larger "
            "train.accumulate, train.capacity, train.moment_dtype=bfloat16, or more chips"
        ) from error
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def told(report: dict[str, Any]) -> str:
    """A report as lines for people."""
    memory, limit = report["memory"], report["chip_memory_bytes"]
    lines = [
        f"{report['config']} on {report['topology']} ({report['chips']} chips), mesh {report['mesh']}",
        f"memory per chip    {report['bytes_per_chip'] / GIB:8.2f} GiB of {limit / GIB:.0f}: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items()),
        f"FLOPs per chip     {report['flops_per_chip']:8.3e}, {report['flops_ratio']:.3f} x what the tokens need",
        *(f"sent per device    {size / GIB:8.2f} GiB {kind}" for kind, size in report["collective_bytes"].items()),
        f"a step, at best    {report['roofline_step_ms']:8.0f} ms, bound by {report['bound_by']}",
        f"tokens/s per chip  {report['tokens_per_s_per_chip']:8.0f} at best, MFU {report['mfu']:.1%}",
    ]
    return "\n".join(lines)
