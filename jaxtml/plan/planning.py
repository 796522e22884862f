"""`jaxtml plan`: compiles the real program for a pod that is elsewhere, and reports what the program needs.

The program is the trainer's own step, or the server's step for one micro-turn: 200 ms of input and output of every
session. `compilation` compiles the program, `report` turns counts into figures, `search` finds the largest batch.
Called by the command line.
"""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from typing import Any

from absl import logging
from jax.extend.core import ClosedJaxpr

from jaxtml.config import Config, override
from jaxtml.errors import InputError
from jaxtml.model.duplex.grammar import max_generated
from jaxtml.model.duplex.state import NARROW_PREFILL, wide_prefill
from jaxtml.model.flops import train_flops_per_token
from jaxtml.model.placement import Placement
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import count_jaxpr_work
from jaxtml.plan.compilation import DoesNotFit, compile_program
from jaxtml.plan.programs import device_bytes, make_serving_program, make_training_program
from jaxtml.plan.report import Report, ServingLoad, report_serving, report_training
from jaxtml.plan.search import search_variants
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN
from jaxtml.train.gradients import check_batch

REMATS: tuple[str, ...] = ("none", "outputs", "full")  # the values of `train.remat`, in the order of falling memory
_REMEDIES = {
    "train": "train.remat=full, a smaller train.batch or a larger train.accumulate, train.capacity, "
    "train.moment_dtype=bfloat16",
    "serve": "fewer serve.sessions, a larger axis tensor in --mesh, serve.int8_experts=true",
}


def make_plan(config: Config, topology: str, mesh: str | None, program: str) -> Report:
    """Plans a config on a topology.

    Args:
      config: the model, with its training and serving.
      topology: such as "v5p:4x4x8"; `Topology.parse` lists all spellings.
      mesh: such as "data=16,expert=8"; None: the usual mesh, see `_usual_mesh`.
      program: "train" or "serve".

    Returns:
      The report of `report_training` or `report_serving`, with `config`, `program`, `topology` and `mesh`.

    Raises:
      InputError: there is no such topology or no compiler for it, or the mesh, the batch or the sessions do not fit it.
      DoesNotFit: the program needs more memory than a chip has.
    """
    return _plan(config, *_parse_place(config, topology, mesh, program), program)


def search_largest_plan(config: Config, topology: str, mesh: str | None, program: str) -> Report:
    """Searches the batch and the remat that train the most tokens per second, or the most sessions that fit.

    The arguments are those of `make_plan`. The report also has `set`, the overrides of the config that give the plan,
    and `searched`, the result of each remat.

    Raises:
      InputError: as `make_plan`, or nothing fits.
    """
    where, shape = _parse_place(config, topology, mesh, program)
    if program == "train":
        variants, unit, field = [*REMATS], shape.batch_shards * config.train.accumulate, "train.batch"
    else:
        variants, unit, field = [""], Placement(shape, config.serve.transport).session_shards, "serve.sessions"

    def overrides(variant: str, n: int) -> list[str]:
        return [f"{field}={n * unit}", *([f"train.remat={variant}"] if variant else [])]

    def measure(variant: str, n: int) -> Report | None:
        changed = config
        for text in overrides(variant, n):
            changed = override(changed, text)
        logging.info("compiling %s", " ".join(overrides(variant, n)))
        try:
            return _plan(changed, where, shape, program)
        except DoesNotFit as error:
            logging.info("%s", error)
            return None

    results = search_variants(variants, measure)
    if not results:
        remedy = f"try {_REMEDIES[program]}, or more chips"
        raise InputError(f"{config.name}: not even {field}={unit} fits {where}: {remedy}")
    columns = ("bytes_per_chip", "roofline_step_ms", "tokens_per_s_per_chip", "mfu")
    table = [{"set": overrides(variant, n)} | {key: report[key] for key in columns} for variant, n, report in results]
    return results[0][2] | {"set": table[0]["set"], "searched": table}


def _parse_place(config: Config, topology: str, mesh: str | None, program: str) -> tuple[Topology, MeshShape]:
    where = Topology.parse(topology)
    if mesh is None:
        return where, _usual_mesh(config, where, program)
    shape = MeshShape.parse(mesh)
    if shape.devices != where.devices:
        raise InputError(
            f"mesh {shape} has {shape.devices} devices, and {where} has {where.devices}: name axes whose product is "
            f"{where.devices}, or leave --mesh out"
        )
    return where, shape


def _usual_mesh(config: Config, topology: Topology, program: str) -> MeshShape:
    """Returns the mesh for a plan that names none.

    For training, slices are `replica`, and all devices of a slice are `data`. For serving, `expert` is the largest
    divisor of a slice's devices that divides both sessions and experts. Of the remaining devices, `tensor` is the
    largest divisor that divides the key/value heads.
    The rest is `data`.
    """
    devices = topology.devices
    if program == "train":
        return MeshShape(replica=topology.slices, data=devices // topology.slices)
    b = config.backbone
    slice_devices = devices // topology.slices
    expert = math.gcd(slice_devices, config.serve.sessions, b.n_experts)
    tensor = math.gcd(slice_devices // expert, b.sliding.n_kv_heads, b.global_.n_kv_heads)
    return MeshShape(data=devices // (expert * tensor), expert=expert, tensor=tensor)


def _plan(config: Config, topology: Topology, mesh: MeshShape, program: str) -> Report:
    described = {"config": config.name, "program": program, "topology": str(topology), "mesh": str(mesh)}
    return described | (plan_serving if program == "serve" else plan_training)(config, topology, mesh)


def plan_training(config: Config, topology: Topology, mesh: MeshShape) -> Report:
    """Compiles a training step and reports it; the arguments and errors are those of `make_plan`."""
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


def plan_serving(config: Config, topology: Topology, mesh: MeshShape) -> Report:
    """Compiles a micro-turn of the server and reports it; the arguments and errors are those of `make_plan`."""
    make_program = partial(make_serving_program, config, mesh, topology.platform)
    compiled = compile_program(make_program, topology, mesh, config.name, _REMEDIES["serve"])
    load = measure_serving_load(config, mesh, compiled.arguments, compiled.jaxpr, topology.platform)
    return report_serving(config, load, compiled.memory, topology, mesh)


def measure_serving_load(
    config: Config, mesh: MeshShape, arguments: tuple[Any, ...], jaxpr: ClosedJaxpr, platform: str
) -> ServingLoad:
    """Measures what a device of a serving program holds and does, from the program's arguments and jaxpr."""
    params, state, _ = arguments
    routed = device_bytes(_routed_experts(params))
    # The program has a loop (see `ServingLoad`), and how many rounds it takes is not known. The work of one round is
    # the difference between a count with one round and a count with none.
    before_loop, with_one_round = (count_jaxpr_work(jaxpr, platform, rounds=n) for n in (0, 1))
    one_round = with_one_round.scaled(1)
    one_round.add(before_loop, -1)
    return ServingLoad(
        sessions=config.serve.sessions,
        session_shards=Placement(mesh, config.serve.transport).session_shards,
        experts=routed,
        weights=device_bytes(params) - routed,
        state=device_bytes(state),
        rare=device_bytes([params["embed"], params["visual"]]),
        flow=device_bytes(params["flow"]),
        # Without a round and with the cheapest branches, the program is a micro-turn in which every session listens.
        listening=count_jaxpr_work(jaxpr, platform, rounds=0, least=True),
        fullest=before_loop,
        one_round=one_round,
        prefill=(NARROW_PREFILL, wide_prefill(config.duplex)),
        max_rounds=max_generated(config.duplex) + FRAMES_PER_MICRO_TURN,
    )


def _routed_experts(params: Any) -> list[Any]:
    """Returns the arrays of routed experts in a tree of parameters."""
    if isinstance(params, dict) and "router" in params:
        return [params[name] for name in ("w13", "w2", "w13_scale", "w2_scale") if name in params]
    parts = params.values() if isinstance(params, dict) else params if isinstance(params, list) else ()
    return [array for part in parts for array in _routed_experts(part)]
