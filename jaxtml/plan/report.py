"""Turns the work and memory of a compiled program into the figures of a plan. Pure arithmetic; called by `planning`.

A training step reads each of its arguments and writes each of its outputs once. A forward pass in serving reads the
weights that it needs, and what the sessions remember. `roofline` has the rules by which these become seconds.

The serving program is one micro-turn: 200 ms of input and output of every session. `micro_turn` says which forward
passes it has. The passes of a micro-turn run one after the other, and so do their collectives.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jaxtml.config import Config
from jaxtml.model.flops import forward_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.micro_turn import Course, MicroTurnProgram, Turn
from jaxtml.plan.mix import Mix, batch_shares, quantile
from jaxtml.plan.roofline import Memory, compute_roofline
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import MICRO_TURN_MS

Report = dict[str, Any]  # what `jaxtml plan --json` prints

LONG_SESSION_TOKENS = 2**24  # a session in which every window has long been full
# Text tokens that each session writes in the speaking micro-turn of `turn_ms`: SAY, which begins the text, and two
# more. Two tokens per 200 ms are ten per second, more than speech of two to three words per second needs.
WRITTEN_TOKENS = 3


def report_training(
    work: Work,
    memory: Memory,
    argument_bytes: Mapping[str, int],
    topology: Topology,
    mesh: MeshShape,
    tokens: int,
    needed_flops: float,
) -> Report:
    """Returns the report of a training step.

    Args:
      work: of one device.
      memory: of one device.
      argument_bytes: bytes of one device by the name of an argument.
      topology: the hardware.
      mesh: the shape of the mesh over its devices.
      tokens: of the complete batch.
      needed_flops: of the complete step (`jaxtml.model.flops`).
    """
    times = compute_roofline(work, memory.arguments + memory.outputs, topology, mesh)
    memory_parts = {
        **argument_bytes,
        "temporaries": memory.temporaries,
        "other": memory.total - sum(argument_bytes.values()) - memory.temporaries,
    }
    report = _report_common(work, memory, topology, times.step, tokens, needed_flops, memory_parts)
    return report | {"bound_by": times.bound}


def _report_common(
    work: Work,
    memory: Memory,
    topology: Topology,
    seconds: float,
    tokens: float,
    needed_flops: float,
    memory_parts: Mapping[str, float],
) -> Report:
    """Returns the figures that the reports of both programs have; `memory_parts` are bytes of one device."""
    chip = topology.chip
    return {
        "chips": topology.chips,
        "bytes_per_chip": memory.total * chip.devices,
        "chip_memory_bytes": int(chip.memory),
        "flops_per_chip": work.flops * chip.devices,
        "flops_ratio": work.flops * topology.devices / needed_flops,
        "collective_bytes": {f"{kind} over {'+'.join(axes)}": size for (kind, axes), size in work.sent.most_common()},
        "collective_calls": {f"{kind} over {'+'.join(axes)}": work.calls[kind, axes] for kind, axes in work.sent},
        "roofline_step_ms": 1e3 * seconds,
        "tokens_per_s_per_chip": tokens / seconds / topology.chips,
        "mfu": needed_flops / (seconds * topology.chips * chip.flops),
        "memory": {name: size * chip.devices for name, size in memory_parts.items()},
    }


@dataclass(frozen=True)
class ServingLoad:
    """What a device of a serving program holds and does. Bytes and work are those of one device.

    Attributes:
      sessions: on all devices, a multiple of `session_shards`.
      session_shards: the number of parts into which the mesh splits the sessions.
      experts: bytes of routed experts.
      weights: bytes of all other parameters.
      state: bytes that the sessions remember.
      program: the parts of a micro-turn.
      max_written: the most text tokens that a session writes in a micro-turn before the gate.
    """

    sessions: int
    session_shards: int
    experts: float
    weights: float
    state: float
    program: MicroTurnProgram
    max_written: int


class TurnTime(NamedTuple):
    """The time of a micro-turn of all sessions.

    Attributes:
      roofline: seconds without the latency of collectives.
      latency: seconds that the collectives take besides.
      weights: seconds of reading the weights, a part of `roofline` where memory bounds it.
      passes: forward passes.
      collectives: collectives.
    """

    roofline: float
    latency: float
    weights: float
    passes: int
    collectives: int

    @property
    def total(self) -> float:
        """Seconds with the latency of collectives."""
        return self.roofline + self.latency


def time_course(
    config: Config, load: ServingLoad, topology: Topology, mesh: MeshShape, course: Course, share: float = 1.0
) -> TurnTime:
    """Returns the time of a micro-turn, with `share` times the sessions of the plan."""
    times: list[list[float]] = []
    for work, often in load.program.parts(course):
        # The experts of a device see only the sessions of the device's own part of `replica` and `data`.
        seen = load.sessions * share / (mesh.replica * mesh.data)
        experts = sum(
            n * load.experts * _used_experts(config, positions * seen) for (_, positions), n in work.passes.items()
        )
        passes = sum(work.passes.values())
        bytes_read = work.read + experts
        bound = compute_roofline(work.scaled(share), bytes_read + passes * share * load.state, topology, mesh)
        rate = topology.chip.memory_rate / topology.chip.devices
        once = TurnTime(bound.step, bound.latency, bytes_read / rate, passes, sum(work.calls.values()))
        times.append([often * part for part in once])
    return TurnTime(*map(sum, zip(*times, strict=True)))


def named_courses(load: ServingLoad) -> dict[str, Course]:
    """Returns the courses of three micro-turns: all sessions listen, all speak, and the longest possible.

    In the second, sessions write `WRITTEN_TOKENS` tokens, and the model confirms all tokens that are guessed. In the
    longest, it confirms none.
    """
    program = load.program
    return {
        "listening": program.course(Turn(False, 0, False), 0),
        "speaking": program.course(Turn(False, WRITTEN_TOKENS, True), program.round_positions),
        "longest": program.course(Turn(True, load.max_written, True), 0),
    }


def report_serving(
    config: Config, load: ServingLoad, memory: Memory, topology: Topology, mesh: MeshShape, mix: Mix
) -> Report:
    """Returns the report of serving; its common figures are those of a micro-turn in which all sessions speak.

    - `turn_ms`: rooflines of the three micro-turns of `named_courses`, without the latency of collectives.
    - `turn_with_latency_ms`: with this latency. Real time needs at most 200 ms, so `real_time` looks at the longest.
    - `turn_passes`, `turn_collectives`: forward passes and collectives of these micro-turns.
    - `weight_floor_ms`: the time of reading the weights in them.
    - `mix_ms`: the median, the 95th percentile and the longest of micro-turns of `mix`, with latency.
    - `sessions_at_200_ms`: the sessions that fit into memory and whose longest micro-turn takes at most 200 ms. This
      number is extrapolated from the sessions of the plan, in proportion.
    """
    chip, n = topology.chip, load.sessions
    timed = partial(time_course, config, load, topology, mesh)
    courses = named_courses(load)
    times = {name: timed(course) for name, course in courses.items()}

    work = Work()
    for part, often in load.program.parts(courses["speaking"]):
        work.add(part, often)
    tokens = n * (load.program.narrow.positions + WRITTEN_TOKENS + load.program.speech.positions)
    unembed = 2 * config.backbone.d_model * config.backbone.vocab_size
    per_token = forward_flops_per_token(config, LONG_SESSION_TOKENS) - unembed
    needed_flops = tokens * per_token + n * (1 + WRITTEN_TOKENS) * unembed
    memory_parts = {
        "routed experts": load.experts,
        "other weights": load.weights,
        "sessions": load.state,
        "temporaries": memory.temporaries,
        "other": memory.total - load.experts - load.weights - load.state - memory.temporaries,
    }
    report = _report_common(work, memory, topology, times["speaking"].roofline, tokens, needed_flops, memory_parts)
    fixed_bytes = load.experts + load.weights + memory.code
    bytes_per_session = (memory.total - fixed_bytes) / n
    # Sessions are counted in units of one session per shard.
    units_in_memory = int((chip.memory / chip.devices - fixed_bytes) / bytes_per_session) // load.session_shards
    units_in_time = bisect_right(
        range(1, units_in_memory + 1),
        MICRO_TURN_MS,
        key=lambda units: 1e3 * timed(courses["longest"], units * load.session_shards / n).total,
    )
    return report | {
        "sessions": n,
        "sessions_at_200_ms": units_in_time * load.session_shards,
        "turn_ms": {name: 1e3 * time.roofline for name, time in times.items()},
        "turn_with_latency_ms": {name: 1e3 * time.total for name, time in times.items()},
        "turn_passes": {name: time.passes for name, time in times.items()},
        "turn_collectives": {name: time.collectives for name, time in times.items()},
        "weight_floor_ms": {name: 1e3 * time.weights for name, time in times.items()},
        "mix": mix.name,
        "mix_ms": _time_mix(load, mix, timed),
        "real_time": 1e3 * times["longest"].total <= MICRO_TURN_MS,
    }


def _time_mix(load: ServingLoad, mix: Mix, timed: Callable[[Course], TurnTime]) -> dict[str, float]:
    """Returns milliseconds of a batch's micro-turns, with latency: median, 95th percentile and longest of the mix."""

    def course(turn: Turn) -> Course:
        written = min(turn.written, load.max_written)  # the config allows no more; the rest waits
        return load.program.course(turn._replace(written=written), mix.confirmed)

    shares: dict[float, float] = {}
    for batch, share in batch_shares(mix, load.sessions, course).items():
        ms = 1e3 * timed(batch).total
        shares[ms] = shares.get(ms, 0) + share
    return {"p50": quantile(shares, 0.5), "p95": quantile(shares, 0.95), "longest": max(shares)}


def _used_experts(config: Config, tokens: float) -> float:
    """Returns the share of a layer's experts that work on any of `tokens` tokens, if experts are chosen evenly."""
    b = config.backbone
    return 1 - (1 - b.experts_per_token / b.n_experts) ** tokens
