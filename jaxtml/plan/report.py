"""Turns the work and memory of a compiled program into the figures of a plan. Pure arithmetic; called by `planning`.

A training step reads each of its arguments and writes each of its outputs once. A forward pass in serving reads the
weights that it needs, and what the sessions remember. `roofline` has the rules by which these become seconds.

The serving program is one micro-turn: 200 ms of input and output of every session. It has one forward pass over the
input, and then a loop. In each round of the loop, every session writes a token or speaks 50 ms.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtml.config import Config
from jaxtml.model.flops import forward_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.roofline import Memory, compute_roofline
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, MICRO_TURN_MS

Report = dict[str, Any]  # what `jaxtml plan --json` prints

LONG_SESSION_TOKENS = 2**24  # a session in which every window has long been full
# Text tokens that a speaking micro-turn writes: SAY, which begins the text, and two more. Two tokens per 200 ms are ten
# per second, more than speech of two to three words per second needs.
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
        "roofline_step_ms": 1e3 * seconds,
        "tokens_per_s_per_chip": tokens / seconds / topology.chips,
        "mfu": needed_flops / (seconds * topology.chips * chip.flops),
        "memory": {name: size * chip.devices for name, size in memory_parts.items()},
    }


@dataclass(frozen=True)
class ServingLoad:
    """What a device of a serving program holds and does. Bytes and work are those of one device.

    In a micro-turn the model first reads the input. A loop then generates text and speech: each round of the loop
    generates one position of every session that is not done.

    Attributes:
      sessions: on all devices, a multiple of `session_shards`.
      session_shards: the number of parts into which the mesh splits the sessions.
      experts: bytes of routed experts.
      weights: bytes of all other parameters.
      state: bytes that the sessions remember.
      rare: bytes among `weights` whose reading counts as no time: a token reads only a few rows of the embedding, and
        the vision tower works only on video.
      flow: bytes among `weights` that are read only while a session speaks.
      listening: work of a micro-turn in which every session listens.
      fullest: work before the loop, if every session receives the most text and patches that a micro-turn can take.
      one_round: work of one round of the loop.
      prefill: the number of input positions of a session, twice: without text and patches, and with the most text and
        patches that a micro-turn can take.
      max_rounds: the most rounds that a micro-turn can take.
    """

    sessions: int
    session_shards: int
    experts: float
    weights: float
    state: float
    rare: float
    flow: float
    listening: Work
    fullest: Work
    one_round: Work
    prefill: tuple[int, int]
    max_rounds: int


class _Pass(NamedTuple):
    """One forward pass, in which the weights are read once.

    Attributes:
      work: of one device.
      tokens: of all sessions.
      speaks: whether any session speaks.
    """

    work: Work
    tokens: int
    speaks: bool


def report_serving(config: Config, load: ServingLoad, memory: Memory, topology: Topology, mesh: MeshShape) -> Report:
    """Returns the report of serving, for a micro-turn in which every session writes `WRITTEN_TOKENS` tokens and speaks.

    `turn_ms` has the rooflines of three micro-turns: all sessions listen, all sessions speak, and the longest possible.
    `weight_floor_ms` has the time of reading the weights in each of these micro-turns. `sessions_at_200_ms` is the
    number of sessions that fit into memory and whose speaking micro-turn has a roofline of at most 200 ms. This number
    is extrapolated from the sessions of the plan, in proportion.
    """
    chip, n = topology.chip, load.sessions
    passes = _micro_turn_passes(load)

    def read_bytes(one_pass: _Pass, share: float = 1.0) -> float:
        """Returns the bytes of weights that a pass reads, with `share` times the sessions of the plan."""
        # The experts of a device see only the sessions of the device's own part of `replica` and `data`.
        used = _used_experts(config, one_pass.tokens * share / (mesh.replica * mesh.data))
        return load.weights - load.rare - (0 if one_pass.speaks else load.flow) + load.experts * used

    def seconds(name: str, share: float = 1.0) -> float:
        """Returns the roofline of a micro-turn with `share` times the sessions of the plan."""
        return sum(
            compute_roofline(
                one_pass.work.scaled(share), read_bytes(one_pass, share) + share * load.state, topology, mesh
            ).step
            for one_pass in passes[name]
        )

    work = Work()
    for one_pass in passes["speaking"]:
        work.add(one_pass.work)
    tokens = n * (load.prefill[0] + len(passes["speaking"]) - 1)
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
    report = _report_common(work, memory, topology, seconds("speaking"), tokens, needed_flops, memory_parts)
    fixed_bytes = load.experts + load.weights + memory.code
    bytes_per_session = (memory.total - fixed_bytes) / n
    # Sessions are counted in units of one session per shard.
    units_in_memory = int((chip.memory / chip.devices - fixed_bytes) / bytes_per_session) // load.session_shards
    units_in_time = bisect_right(
        range(1, units_in_memory + 1),
        MICRO_TURN_MS / 1e3,
        key=lambda units: seconds("speaking", units * load.session_shards / n),
    )
    rate = chip.memory_rate / chip.devices
    return report | {
        "sessions": n,
        "sessions_at_200_ms": units_in_time * load.session_shards,
        "turn_ms": {name: 1e3 * seconds(name) for name in passes},
        "weight_floor_ms": {name: 1e3 * sum(map(read_bytes, turn)) / rate for name, turn in passes.items()},
    }


def _micro_turn_passes(load: ServingLoad) -> dict[str, list[_Pass]]:
    """Returns the forward passes of three micro-turns: all sessions listen, all speak, and the longest possible."""
    n, (narrow, wide) = load.sessions, load.prefill
    listening = _Pass(load.listening, n * narrow, False)
    write, speak = _Pass(load.one_round, n, False), _Pass(load.one_round, n, True)
    speech = [speak] * FRAMES_PER_MICRO_TURN
    return {
        "listening": [listening],
        "speaking": [listening, *[write] * (1 + WRITTEN_TOKENS), *speech],
        "longest": [
            _Pass(load.fullest, n * wide, False),
            *[write] * (load.max_rounds - FRAMES_PER_MICRO_TURN),
            *speech,
        ],
    }


def _used_experts(config: Config, tokens: float) -> float:
    """Returns the share of a layer's experts that work on any of `tokens` tokens, if experts are chosen evenly."""
    b = config.backbone
    return 1 - (1 - b.experts_per_token / b.n_experts) ** tokens
