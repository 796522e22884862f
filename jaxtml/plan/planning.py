"""`jaxtml plan`: compiles the real program for a pod that is not here and says what it needs.

The program is the trainer's own step, or a micro-turn of the server's: its work is counted on its jaxpr, its memory is
what the compiler allots. Called by the command line.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import jax
from absl import logging

from jaxtml.config import Config, override
from jaxtml.errors import InputError
from jaxtml.model.duplex.grammar import max_generated
from jaxtml.model.duplex.state import NARROW_PREFILL, wide_prefill
from jaxtml.model.flops import train_flops_per_token
from jaxtml.model.placement import Placement
from jaxtml.parallel.mesh import MeshShape, make_mesh
from jaxtml.parallel.work import count_jaxpr_work
from jaxtml.plan.compilation import _HELPS, DoesNotFit, _compiled_memory, _return_memory
from jaxtml.plan.programs import Program, device_bytes, make_serving_program, make_training_program
from jaxtml.plan.report import ServingLoad, report_serving, report_training
from jaxtml.plan.search import search_kinds
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN
from jaxtml.train.gradients import check_batch

REMATS: tuple[str, ...] = ("none", "outputs", "full")  # what `train.remat` may be, the cheapest first


def make_plan(config: Config, topology: str, mesh: str | None, program: str) -> dict[str, Any]:
    """The report of `report.report_training` or `report.report_serving` for a config on a topology.

    Args:
      config: of the model.
      topology: as `v5p:4x4x8`.
      mesh: as `data=16,expert=8`; None: all `data` to train; to serve as much `expert` as sessions and experts divide
        by, then as much `tensor` as heads do, and the rest `data`.
      program: "train" or "serve".

    Raises:
      InputError: no such topology, a mesh, batch or number of sessions that does not fit it, or more memory than a chip
        has.
    """
    return _planned(config, *_place(config, topology, mesh, program), program)


def _place(config: Config, topology: str, mesh: str | None, program: str) -> tuple[Topology, MeshShape]:
    where = Topology.parse(topology)
    return where, MeshShape.parse(mesh) if mesh else _usual_mesh(config, where.devices, program)


def _planned(config: Config, where: Topology, shape: MeshShape, program: str) -> dict[str, Any]:
    if program == "train":
        check_batch(config.train, shape)
        if where.chip.gpu is not None and importlib.util.find_spec("tokamax") is None:
            raise InputError(f"{where}: GPUs train with tokamax' kernels, which are not here: pip install tokamax")
    _return_memory()
    jax.config.update("jax_platforms", "cpu")  # libtpu is a compiler here: nobody should look for its devices
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for others cannot be read back here
    devices = where.find_devices()
    with jax.set_mesh(make_mesh(shape, devices)):
        serving = program == "serve"
        made = make_serving_program(config, shape, where.platform) if serving else make_training_program(config, shape)
        jitted = jax.jit(made.function, donate_argnums=made.donated)
        with jax.default_device(devices[0]):  # libraries of kernels look where programs will run
            traced = jitted.trace(*made.arguments)
            memory = _compiled_memory(traced, config, where, program)
        # A GPU's libraries hide their products in kernels: counted is the program without them.
        jaxpr = traced.jaxpr if where.chip.gpu is None else jitted.trace(*made.arguments).jaxpr
    named = {"config": config.name, "program": program, "topology": str(where), "mesh": str(shape)}
    if serving:
        return named | report_serving(
            config, _serving_load(config, shape, made, jaxpr, where.platform), memory, where, shape
        )
    tokens = config.train.batch * config.data.tokens
    needed = train_flops_per_token(config) * tokens
    state, batch = made.arguments
    held = {"parameters": state.params, "moments": state.moments, "batch": batch}
    held = {name: device_bytes(tree) for name, tree in held.items()}
    return named | report_training(count_jaxpr_work(jaxpr, where.platform), memory, held, where, shape, tokens, needed)


def _usual_mesh(config: Config, devices: int, program: str) -> MeshShape:
    if program == "train":
        return MeshShape(data=devices)
    b = config.backbone
    expert = math.gcd(devices, config.serve.sessions, b.n_experts)
    tensor = math.gcd(devices // expert, b.sliding.n_kv_heads, b.global_.n_kv_heads)
    return MeshShape(data=devices // (expert * tensor), expert=expert, tensor=tensor)


def _serving_load(config: Config, shape: MeshShape, program: Program, jaxpr: Any, platform: str) -> ServingLoad:
    params, state, _ = program.arguments
    routed = device_bytes(_routed(params))
    # The loop's work is what one round more adds. Without any, the cheapest branches are a micro-turn of listening.
    none, one = (count_jaxpr_work(jaxpr, platform, rounds=n) for n in (0, 1))
    turn = one.scaled(1)
    turn.add(none, -1)
    return ServingLoad(
        sessions=config.serve.sessions,
        parts=Placement(shape, config.serve.transport).session_shards,
        experts=routed,
        weights=device_bytes(params) - routed,
        state=device_bytes(state),
        rare=device_bytes([params["embed"], params["visual"]]),
        flow=device_bytes(params["flow"]),
        widest=none,
        listening=count_jaxpr_work(jaxpr, platform, rounds=0, least=True),
        turn=turn,
        given=(NARROW_PREFILL, wide_prefill(config.duplex)),
        longest=max_generated(config.duplex) + FRAMES_PER_MICRO_TURN,
    )


def _routed(params: Any) -> list[Any]:
    """The arrays of routed experts in a tree of parameters."""
    if isinstance(params, dict) and "router" in params:
        return [params[name] for name in ("w13", "w2", "w13_scale", "w2_scale") if name in params]
    parts = params.values() if isinstance(params, dict) else params if isinstance(params, list) else ()
    return [array for part in parts for array in _routed(part)]


def search_largest_plan(config: Config, topology: str, mesh: str | None, program: str) -> dict[str, Any]:
    """The plan with the largest batch and the remat that give most tokens a second, or the most sessions, that fit.

    The report says in `set` how to have it and in `searched` what each remat came to.

    Raises:
      InputError: as `plan`, and where nothing fits.
    """
    where, shape = _place(config, topology, mesh, program)
    if program == "train":
        kinds, unit, name = [*REMATS], shape.batch_shards * config.train.accumulate, "train.batch"
    else:
        kinds, unit, name = [""], Placement(shape, config.serve.transport).session_shards, "serve.sessions"

    def settings(kind: str, n: int) -> list[str]:
        return [f"{name}={n * unit}", *([f"train.remat={kind}"] if kind else [])]

    def measure(kind: str, n: int) -> dict[str, Any] | None:
        changed = config
        for text in settings(kind, n):
            changed = override(changed, text)
        logging.info("compiling %s", " ".join(settings(kind, n)))
        try:
            return _planned(changed, where, shape, program)
        except DoesNotFit as error:
            logging.info("%s", error)
            return None

    found = search_kinds(kinds, measure)
    if not found:
        raise InputError(f"{config.name}: not even {name}={unit} fits {where}: try {_HELPS[program]}, or more chips")
    kept = ("bytes_per_chip", "roofline_step_ms", "tokens_per_s_per_chip", "mfu")
    table = [{"set": settings(kind, n)} | {key: report[key] for key in kept} for kind, n, report in found]
    return found[0][2] | {"set": table[0]["set"], "searched": table}
