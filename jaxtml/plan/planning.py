"""`jaxtml plan`: compiles the real program for a pod that is elsewhere, and reports what the program needs.

The program is the trainer's own step, or the server's step for one micro-turn: 200 ms of input and output of every
session. `compilation` compiles the program, `micro_turn` reads its parts, and `report` turns counts into figures.
`real_time` refuses a server that is too slow, `search` finds the largest batch. Called by the command line.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from absl import logging

from jaxtml.config import Config, override
from jaxtml.errors import InputError
from jaxtml.model.duplex.grammar import max_generated
from jaxtml.model.flops import train_flops_per_token
from jaxtml.model.placement import Placement
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import count_jaxpr_work
from jaxtml.plan.compilation import DoesNotFit, compile_program, prepare_process
from jaxtml.plan.micro_turn import MicroTurnProgram
from jaxtml.plan.mix import Mix
from jaxtml.plan.programs import device_bytes, make_serving_program, make_training_program, trace_program
from jaxtml.plan.real_time import TooSlow, check_real_time, longest_ms
from jaxtml.plan.report import Report, ServingLoad, report_serving, report_training
from jaxtml.plan.search import search_variants
from jaxtml.plan.topology import Topology
from jaxtml.train.gradients import check_batch

REMATS: tuple[str, ...] = ("none", "outputs", "full")  # the values of `train.remat`, in the order of falling memory
_REMEDIES = {
    "train": "train.remat=full, a smaller train.batch or a larger train.accumulate, train.capacity, "
    "train.moment_dtype=bfloat16",
    "serve": "fewer serve.sessions, a larger axis tensor in --mesh, serve.int8_experts=true",
}


class Plan(NamedTuple):
    """What to plan.

    Attributes:
      config: the model, with its training and serving.
      program: "train" or "serve".
      mix: what the sessions of a server do.
      slow_too: whether a server is reported although it is not fast enough for real time.
    """

    config: Config
    program: str
    mix: Mix
    slow_too: bool = False


def make_plan(plan: Plan, topology: str, mesh: str | None) -> Report:
    """Plans a program on a topology.

    Args:
      plan: the program.
      topology: such as "v5p:4x4x8"; `Topology.parse` lists all spellings.
      mesh: such as "data=16,expert=8"; None: the usual mesh, see `_usual_mesh`.

    Returns:
      The report of `report_training` or `report_serving`, with `config`, `program`, `topology` and `mesh`.

    Raises:
      InputError: there is no such topology or no compiler for it, or the mesh, the batch or the sessions do not fit it.
      DoesNotFit: the program needs more memory than a chip has.
      TooSlow: a server's longest micro-turn takes more than 200 ms, unless `slow_too`.
    """
    return _plan(plan, *_parse_place(plan, topology, mesh))


def search_largest_plan(plan: Plan, topology: str, mesh: str | None) -> Report:
    """Searches the batch and the remat that train the most tokens per second, or the most sessions that fit.

    The arguments are those of `make_plan`. The report also has `set`, the overrides of the config that give the plan,
    and `searched`, the result of each remat.

    Raises:
      InputError: as `make_plan`, or nothing fits.
    """
    where, shape = _parse_place(plan, topology, mesh)
    config = plan.config
    if plan.program == "train":
        variants, unit, field = [*REMATS], shape.batch_shards * config.train.accumulate, "train.batch"
    else:
        variants, unit, field = [""], Placement(shape, config.serve.transport).session_shards, "serve.sessions"

    def overrides(variant: str, n: int) -> list[str]:
        return [f"{field}={n * unit}", *([f"train.remat={variant}"] if variant else [])]

    refused: list[DoesNotFit | TooSlow] = []

    def measure(variant: str, n: int) -> Report | None:
        changed = config
        for text in overrides(variant, n):
            changed = override(changed, text)
        logging.info("compiling %s", " ".join(overrides(variant, n)))
        try:
            return _plan(plan._replace(config=changed), where, shape)
        except (DoesNotFit, TooSlow) as error:
            logging.info("%s", error)
            refused.append(error)
            return None

    results = search_variants(variants, measure)
    if not results and isinstance(refused[-1], TooSlow):
        raise TooSlow(f"not even {field}={unit} will do: {refused[-1]}")
    if not results:
        remedy = f"try {_REMEDIES[plan.program]}, or more chips"
        raise InputError(f"{config.name}: not even {field}={unit} fits {where}: {remedy}")
    columns = ("bytes_per_chip", "roofline_step_ms", "tokens_per_s_per_chip", "mfu")
    table = [{"set": overrides(variant, n)} | {key: report[key] for key in columns} for variant, n, report in results]
    return results[0][2] | {"set": table[0]["set"], "searched": table}


def _parse_place(plan: Plan, topology: str, mesh: str | None) -> tuple[Topology, MeshShape]:
    where = Topology.parse(topology)
    if mesh is None:
        return where, _usual_mesh(plan.config, where, plan.program)
    shape = MeshShape.parse(mesh)
    if shape.devices != where.devices:
        raise InputError(
            f"mesh {shape} has {shape.devices} devices, and {where} has {where.devices}: name axes whose product is "
            f"{where.devices}, or leave --mesh out"
        )
    return where, shape


def _usual_mesh(config: Config, topology: Topology, program: str) -> MeshShape:
    """Returns the mesh for a plan that names none. For training, `replica` has the slices, `data` their devices."""
    if program == "train":
        return MeshShape(replica=topology.slices, data=topology.devices // topology.slices)
    return usual_serving_mesh(config, topology)


def usual_serving_mesh(config: Config, topology: Topology) -> MeshShape:
    """Returns the mesh for a plan of serving that names none: the mesh on which the longest micro-turn is fastest.

    `tensor` may be any number that divides the devices of a slice and the key/value heads. Of the remaining devices of
    the slice, `expert` is the largest divisor that divides both sessions and experts. The rest is `data`. Only meshes
    that can share the sessions evenly are considered, if there are any.
    """
    b = config.backbone
    slice_devices = topology.devices // topology.slices
    most = math.gcd(slice_devices, b.sliding.n_kv_heads, b.global_.n_kv_heads)
    meshes = []
    for tensor in (n for n in range(1, most + 1) if most % n == 0):
        expert = math.gcd(slice_devices // tensor, config.serve.sessions, b.n_experts)
        meshes.append(MeshShape(data=topology.devices // (expert * tensor), expert=expert, tensor=tensor))

    shards = {mesh: Placement(mesh, config.serve.transport).session_shards for mesh in meshes}
    meshes = [mesh for mesh in meshes if config.serve.sessions % shards[mesh] == 0] or meshes[:1]

    def longest(mesh: MeshShape) -> float:
        return longest_ms(config, measure_serving_load(config, topology, mesh), topology, mesh)

    return meshes[0] if len(meshes) == 1 else min(meshes, key=longest)


def _plan(plan: Plan, topology: Topology, mesh: MeshShape) -> Report:
    prepare_process()
    described = {
        "config": plan.config.name,
        "program": plan.program,
        "topology": str(topology),
        "mesh": str(mesh),
    }
    return described | (plan_serving if plan.program == "serve" else plan_training)(plan, topology, mesh)


def plan_training(plan: Plan, topology: Topology, mesh: MeshShape) -> Report:
    """Compiles a training step and reports it; the arguments and errors are those of `make_plan`."""
    config = plan.config
    check_batch(config.train, mesh)
    if topology.chip.gpu is not None and importlib.util.find_spec("tokamax") is None:
        raise InputError(f"{topology}: GPUs train with tokamax' kernels, which are not installed: pip install tokamax")
    make_program = partial(make_training_program, config, mesh)
    compiled = compile_program(make_program, topology, mesh, config.name, _REMEDIES["train"])
    tokens = config.train.batch * config.data.tokens
    needed_flops = train_flops_per_token(config) * tokens
    state, batch = compiled.arguments
    trees = {"parameters": state.params, "moments": state.moments, "batch": batch}
    argument_bytes = {name: device_bytes(tree) for name, tree in trees.items()}
    work = count_jaxpr_work(compiled.jaxpr, topology.platform)
    return report_training(work, compiled.memory, argument_bytes, topology, mesh, tokens, needed_flops)


def plan_serving(plan: Plan, topology: Topology, mesh: MeshShape) -> Report:
    """Compiles a micro-turn of the server and reports it; the arguments and errors are those of `make_plan`."""
    config = plan.config
    if not plan.slow_too:
        check_real_time(config, topology, mesh, measure_serving_load, usual_serving_mesh)
    make_program = partial(make_serving_program, config, mesh, topology.platform)
    compiled = compile_program(make_program, topology, mesh, config.name, _REMEDIES["serve"])
    load = measure_serving_load(config, topology, mesh)
    return report_serving(config, load, compiled.memory, topology, mesh, plan.mix)


@lru_cache(maxsize=64)
def measure_serving_load(config: Config, topology: Topology, mesh: MeshShape) -> ServingLoad:
    """Traces a server's program without compiling it, and measures what a device holds and does.

    Results are kept: the search of a mesh, the check of real time and the report of one plan ask for the same server.

    Raises:
      InputError: the mesh does not divide the sessions, or a dimension of the model.
    """
    arguments, jaxpr = trace_program(partial(make_serving_program, config, mesh, topology.platform), mesh)
    params, state, _ = arguments
    experts = _routed_experts(params)
    routed = {id(array) for array in experts}
    # How many experts a pass reads depends on its tokens, so `report` counts the reading of experts.
    weights = [id(leaf) not in routed for leaf in jax.tree.leaves(params)]
    return ServingLoad(
        sessions=config.serve.sessions,
        session_shards=Placement(mesh, config.serve.transport).session_shards,
        experts=device_bytes(experts),
        weights=device_bytes(params) - device_bytes(experts),
        state=device_bytes(state),
        program=MicroTurnProgram.measure(jaxpr, topology.platform, weights),
        max_written=max_generated(config.duplex) - 1,
    )


def _routed_experts(params: Any) -> list[Any]:
    """Returns the arrays of routed experts in a tree of parameters."""
    if isinstance(params, dict) and "router" in params:
        return [params[name] for name in ("w13", "w2", "w13_scale", "w2_scale") if name in params]
    parts = params.values() if isinstance(params, dict) else params if isinstance(params, list) else ()
    return [array for part in parts for array in _routed_experts(part)]
