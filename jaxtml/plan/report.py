"""From what a program needs to what that means on a chip: memory against what there is, a time that nothing can beat.

The roofline takes the slowest of three as the time of a step, as if all else were hidden behind it: matrix products at
the published peak, bytes to other devices at the published rate of all links, and bytes of memory at its published
rate: of a training step every argument read and every output written once, of a forward pass in serving the weights
that it needs and what its sessions remember. A real step is slower: no latency of a link or a kernel is in it. Called
by `plan`; pure arithmetic.
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
from jaxtml.plan.roofline import Memory, roofline
from jaxtml.plan.topology import Topology
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, MICRO_TURN_MS


def report_training(
    work: Work,
    memory: Memory,
    held: Mapping[str, int],
    topology: Topology,
    mesh: MeshShape,
    tokens: int,
    needed_flops: float,
) -> dict[str, Any]:
    """The plan of a training step as people and scripts read it.

    Args:
      work: of one device.
      memory: of one device.
      held: bytes of what its arguments are.
      topology: what it is compiled for.
      mesh: over it.
      tokens: of the whole batch.
      needed_flops: of the whole step (`jaxtml.model.flops`).
    """
    time = roofline(work, memory.arguments + memory.outputs, topology, mesh)
    kinds = {
        **held,
        "temporaries": memory.temporaries,
        "other": memory.total - sum(held.values()) - memory.temporaries,
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
WRITTEN_TOKENS = 3  # tokens that a speaking micro-turn writes: SAY and two more, about four words a second


@dataclass(frozen=True)
class ServingLoad:
    """What a device of a serving program holds and does.

    Attributes:
      sessions: on all devices, a multiple of `parts`.
      parts: into how many the mesh splits them.
      experts, weights, state: bytes of its routed experts, of its other parameters, of what its sessions remember.
      rare: bytes among `weights` of which a token reads a few rows or a frame makes use alone: embedding and vision.
      flow: bytes among `weights` that are read where a session speaks.
      listening: work of a micro-turn in which every session listens.
      widest: work of one in which every session is given all that fits, before any round.
      turn: work of one round of the loop: every session writes a token, or speaks 50 ms.
      given: positions read before any round, where nothing is typed or seen and where all that fits is.
      longest: the most rounds that a micro-turn can take.
    """

    sessions: int
    parts: int
    experts: float
    weights: float
    state: float
    rare: float
    flow: float
    listening: Work
    widest: Work
    turn: Work
    given: tuple[int, int]
    longest: int


class _Pass(NamedTuple):
    """One reading of the weights: what is done, tokens of all sessions in it, whether any session speaks."""

    work: Work
    tokens: int
    speaks: bool


def report_serving(
    config: Config, served: ServingLoad, memory: Memory, topology: Topology, mesh: MeshShape
) -> dict[str, Any]:
    """The plan of serving: of a micro-turn in which every session writes `WRITTEN_TOKENS` tokens and speaks.

    `turn_ms` has the roofline of micro-turns in which all listen, all speak, and all take as long as they can;
    `weight_floor_ms` what reading the weights alone takes in each. `sessions_at_200_ms` is how many sessions memory
    should hold, and a speaking micro-turn's roofline leave in 200 ms, counted up from those of the plan in proportion.
    """
    chip, n, (given, wide) = topology.chip, served.sessions, served.given
    writing, speaking = _Pass(served.turn, n, False), _Pass(served.turn, n, True)
    spoken = [speaking] * FRAMES_PER_MICRO_TURN
    turns = {
        "listening": [_Pass(served.listening, n * given, False)],
        "speaking": [_Pass(served.listening, n * given, False), *[writing] * (1 + WRITTEN_TOKENS), *spoken],
        "longest": [
            _Pass(served.widest, n * wide, False),
            *[writing] * (served.longest - FRAMES_PER_MICRO_TURN),
            *spoken,
        ],
    }

    def weights(one: _Pass, share: float = 1.0) -> float:
        # Experts meet the sessions of their own part of `replica` and `data`.
        touched = _touched(config, one.tokens * share / (mesh.replica * mesh.data))
        return served.weights - served.rare - (0 if one.speaks else served.flow) + served.experts * touched

    def seconds(passes: list[_Pass], share: float = 1.0) -> float:
        """Of as many sessions as the plan has, times `share`."""
        return sum(
            roofline(one.work.scaled(share), weights(one, share) + share * served.state, topology, mesh).step
            for one in passes
        )

    work = Work()
    for one in turns["speaking"]:
        work.add(one.work)
    tokens = n * (given + len(turns["speaking"]) - 1)
    unembed = 2 * config.backbone.d_model * config.backbone.vocab_size
    needed = tokens * (forward_flops_per_token(config, LONG) - unembed) + n * (1 + WRITTEN_TOKENS) * unembed
    kinds = {
        "routed experts": served.experts,
        "other weights": served.weights,
        "sessions": served.state,
        "temporaries": memory.temporaries,
        "other": memory.total - served.experts - served.weights - served.state - memory.temporaries,
    }
    report = _report(work, memory, topology, seconds(turns["speaking"]), tokens, needed, kinds)
    fixed = served.experts + served.weights + memory.code
    each = (memory.total - fixed) / n
    room = int((chip.memory / chip.devices - fixed) / each) // served.parts
    fitting = bisect_right(
        range(1, room + 1), MICRO_TURN_MS / 1e3, key=lambda parts: seconds(turns["speaking"], parts * served.parts / n)
    )
    rate = chip.memory_rate / chip.devices
    return report | {
        "sessions": n,
        "sessions_at_200_ms": fitting * served.parts,
        "turn_ms": {name: 1e3 * seconds(passes) for name, passes in turns.items()},
        "weight_floor_ms": {name: 1e3 * sum(map(weights, passes)) / rate for name, passes in turns.items()},
    }


def _touched(config: Config, tokens: float) -> float:
    """The share of a layer's experts that work on any of `tokens` tokens, chosen evenly."""
    b = config.backbone
    return 1 - (1 - b.experts_per_token / b.n_experts) ** tokens
