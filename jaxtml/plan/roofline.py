"""The least time that a program can take on a chip, from its work and the chip's public figures. Called by `report`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtml.parallel.mesh import AXES, MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.topology import Topology

GIB = 2**30


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


def roofline(work: Work, read: float, topology: Topology, mesh: MeshShape) -> Times:
    """The roofline of one device's program that moves `read` bytes of its memory.

    A topology is one slice of TPUs, in which all have fast links to each other; on GPUs what reaches beyond those that
    have goes over the network. The last axes of a mesh are neighbours.
    """
    chip = topology.chip

    def crosses(axes: tuple[str, ...]) -> bool:
        reach = math.prod(mesh.sizes[axis] for axis in AXES[min(map(AXES.index, axes)) :])
        return topology.domain is not None and reach > topology.domain

    crossing = sum(size for (_, axes), size in work.sent.items() if crosses(axes))
    inside = sum(work.sent.values()) - crossing
    return Times(
        compute=work.flops * chip.devices / chip.flops,
        links=inside * chip.devices / chip.link_rate,
        network=crossing * chip.devices / chip.network_rate,
        memory=read * chip.devices / chip.memory_rate,
    )
