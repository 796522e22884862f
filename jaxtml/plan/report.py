"""From what a program needs to what that means on a chip: memory against what there is, a time that nothing can beat.

The roofline takes the slowest of three as the time of a step, as if all else were hidden behind it: matrix products at
the published peak, bytes to other devices at the published rate of all links, and every argument read and every output
written once at the published rate of the memory. A real step is slower. Called by `plan`; pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtml.parallel.work import Work
from jaxtml.plan.topology import Topology


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


def times(work: Work, memory: Memory, topology: Topology) -> Times:
    """The roofline of one device's program; what crosses `replica` goes over the network between slices."""
    chip = topology.chip
    crossing = sum(size for (_, axes), size in work.sent.items() if "replica" in axes)
    inside = sum(work.sent.values()) - crossing
    return Times(
        compute=work.flops * chip.devices / chip.flops,
        links=inside * chip.devices / chip.link_rate,
        network=crossing * chip.devices / chip.network_rate,
        memory=(memory.arguments + memory.outputs) * chip.devices / chip.memory_rate,
    )


def train_report(work: Work, memory: Memory, topology: Topology, tokens: int, needed_flops: float) -> dict[str, Any]:
    """The plan of a training step as people and scripts read it.

    Args:
      work: of one device.
      memory: of one device.
      topology: what it is compiled for.
      tokens: of the whole batch.
      needed_flops: of the whole step (`jaxtml.model.flops`).
    """
    chip, time = topology.chip, times(work, memory, topology)
    return {
        "chips": topology.chips,
        "bytes_per_chip": memory.total * chip.devices,
        "chip_memory_bytes": int(chip.memory),
        "flops_per_chip": work.flops * chip.devices,
        "flops_ratio": work.flops * topology.devices / needed_flops,
        "collective_bytes": {f"{kind} over {'+'.join(axes)}": size for (kind, axes), size in work.sent.most_common()},
        "roofline_step_ms": 1e3 * time.step,
        "bound_by": time.bound,
        "tokens_per_s_per_chip": tokens / time.step / topology.chips,
        "mfu": needed_flops / (time.step * topology.chips * chip.flops),
        "memory": {
            "arguments": memory.arguments * chip.devices,
            "outputs": memory.outputs * chip.devices,
            "aliased": memory.aliased * chip.devices,
            "temporaries": memory.temporaries * chip.devices,
            "code": memory.code * chip.devices,
        },
    }
