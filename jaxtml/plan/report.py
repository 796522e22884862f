"""From what a program needs to what that means on a chip: memory against what there is, a time that nothing can beat.

The roofline takes the slowest of three as the time of a step, as if all else were hidden behind it: matrix products at
the published peak, bytes to other devices at the published rate of all links, and bytes of memory at its published
rate: of a training step every argument read and every output written once, of a forward pass in serving the weights
that it needs and what its sessions remember. A real step is slower: no latency of a link or a kernel is in it. Called
by `plan`; pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtml.config import Config
from jaxtml.model.flops import forward_flops_per_token
from jaxtml.parallel.mesh import AXES, MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import FRAMES_PER_TURN, TURN_MS


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler allots them; `aliased` outputs lie where donated arguments lay."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Times:
    """Seconds of a step by what bounds it: products, links inside a slice, network between slices, memory."""

    compute: float
    links: float
    network: float
    memory: float

    @property
    def step(self) -> float:
        return max(self.compute, self.links, self.network, self.memory)

    @property
    def bound(self) -> str:
        return max(("compute", "links", "network", "memory"), key=lambda name: getattr(self, name))


def times(work: Work, read: float, topology: Topology, mesh: MeshShape) -> Times:
    """The roofline of one device's program that moves `read` bytes of its memory.

    Over the network goes what crosses `replica`, which is across slices, and on GPUs what reaches beyond those that
    have fast links to each other; the last axes of a mesh are neighbours.
    """
    chip = topology.chip

    def crosses(axes: tuple[str, ...]) -> bool:
        reach = math.prod(mesh.sizes[axis] for axis in AXES[min(map(AXES.index, axes)) :])
        return "replica" in axes if topology.domain is None else reach > topology.domain

    crossing = sum(size for (_, axes), size in work.sent.items() if crosses(axes))
    inside = sum(work.sent.values()) - crossing
    return Times(
        compute=work.flops * chip.devices / chip.flops,
        links=inside * chip.devices / chip.link_rate,
        network=crossing * chip.devices / chip.network_rate,
        memory=read * chip.devices / chip.memory_rate,
    )


def train_report(
    work: Work, memory: Memory, topology: Topology, mesh: MeshShape, tokens: int, needed_flops: float
) -> dict[str, Any]:
    """The plan of a training step as people and scripts read it.

    Args:
      work: of one device.
      memory: of one device.
      topology: what it is compiled for.
      mesh: over it.
      tokens: of the whole batch.
      needed_flops: of the whole step (`jaxtml.model.flops`).
    """
    time = times(work, memory.arguments + memory.outputs, topology, mesh)
    kinds = {
        "arguments": memory.arguments,
        "outputs": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
        "code": memory.code,
    }
    return _report(work, memory, topology, time.step, tokens, needed_flops, kinds) | {"bound_by": time.bound}


def _report(
    work: Work,
    memory: Memory,
    topology: Topology,
    seconds: float,
    tokens: float,
    needed_flops: float,
    kinds: Mapping[str, float],
) -> dict[str, Any]:
    """What the plans of both programs have in common; `kinds` are bytes of a device."""
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
        "memory": {name: size * chip.devices for name, size in kinds.items()},
    }


LONG = 2**24  # tokens of a session, when every window has long been full
WRITTEN = 3  # tokens that a speaking micro-turn writes: SAY and two more, about four words a second


@dataclass(frozen=True)
class Served:
    """What a device of a serving program holds and does.

    Attributes:
      sessions: on all devices.
      experts, weights, state: bytes of its routed experts, of its other parameters, of what its sessions remember.
      listening: work of a micro-turn in which every session listens.
      turn: work of one round of the loop: every session writes a token, or speaks 50 ms.
      longest: the most rounds that a micro-turn can take.
    """

    sessions: int
    experts: float
    weights: float
    state: float
    listening: Work
    turn: Work
    longest: int


def serve_report(config: Config, served: Served, memory: Memory, topology: Topology, mesh: MeshShape) -> dict[str, Any]:
    """The plan of serving: of a micro-turn in which every session writes `WRITTEN` tokens and speaks.

    `turn_ms` has the roofline of micro-turns in which all listen, all speak, and all take as long as they can;
    `weight_floor_ms` what reading the weights alone takes in each. `sessions_at_200_ms` is the largest number that
    memory holds and that a speaking micro-turn's roofline leaves in 200 ms, counted up in proportion.
    """
    speaking = 1 + FRAMES_PER_TURN + WRITTEN
    given = 2 + FRAMES_PER_TURN + 1  # LISTEN of the turn before, clock, frames; and the first choice needs no round
    rounds = {"listening": 0, "speaking": speaking, "longest": served.longest}
    chip = topology.chip

    def time(rounds: int, sessions: float, state: bool = True) -> float:
        share = sessions / served.sessions
        found = 0.0
        for work, tokens, count in ((served.listening, sessions * given, 1), (served.turn, sessions, rounds)):
            read = served.weights + served.experts * _touched(config, tokens) + state * share * served.state
            found += count * times(work.times(share), read, topology, mesh).step
        return found

    def floor(rounds: int) -> float:
        passes = ((served.sessions * given, 1), (served.sessions, rounds))
        read = sum(n * (served.weights + served.experts * _touched(config, tokens)) for tokens, n in passes)
        return read * chip.devices / chip.memory_rate

    work = served.listening.times(1)
    work.add(served.turn, speaking)
    tokens = served.sessions * (given + speaking)
    needed = tokens * forward_flops_per_token(config, LONG)
    kinds = {
        "routed experts": served.experts,
        "other weights": served.weights,
        "sessions": served.state,
        "temporaries": memory.temporaries,
        "other": memory.total - served.experts - served.weights - served.state - memory.temporaries,
    }
    report = _report(work, memory, topology, time(speaking, served.sessions), tokens, needed, kinds)
    held = served.experts + served.weights + memory.code
    each = (memory.total - held) / served.sessions
    room = int((chip.memory / chip.devices - held) / each)
    in_time = [n for n in range(1, room + 1) if time(speaking, n) <= TURN_MS / 1e3]
    return report | {
        "sessions": served.sessions,
        "sessions_at_200_ms": max(in_time, default=0),
        "turn_ms": {name: 1e3 * time(n, served.sessions) for name, n in rounds.items()},
        "weight_floor_ms": {name: 1e3 * floor(n) for name, n in rounds.items()},
    }


def _touched(config: Config, tokens: float) -> float:
    """The share of a layer's experts that work on any of `tokens` tokens, chosen evenly."""
    b = config.backbone
    return 1 - (1 - b.experts_per_token / b.n_experts) ** tokens
