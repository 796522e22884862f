"""The roofline: the least time that a program can take on a chip, from its work and the chip's published figures.

The time of a step is that of the slowest of four things, as if everything else were hidden behind it: matrix products
at the published peak, bytes over links, bytes over the network between slices or hosts, and bytes of memory, each at
its published rate. A real step is slower, because no latency of a link or a kernel is counted. Called by `report`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtml.parallel.mesh import AXES, MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.topology import Topology

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler allots them.

    Attributes:
      arguments: all arguments of the program.
      outputs: all outputs.
      aliased: outputs that take the place of donated arguments.
      temporaries: everything else while the program runs.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int = 0

    @property
    def total(self) -> int:
        """Bytes that the program needs; an output that takes the place of an argument counts once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Times:
    """Seconds that a step would take if only one thing bounded it.

    Attributes:
      compute: matrix products.
      links: bytes sent over links inside a slice, or between GPUs with fast links.
      network: bytes sent between slices or hosts.
      memory: bytes of memory that are read or written.
    """

    compute: float
    links: float
    network: float
    memory: float

    @property
    def step(self) -> float:
        """Seconds of a step: those of the slowest of the four."""
        return max(self.compute, self.links, self.network, self.memory)

    @property
    def bound(self) -> str:
        """The name of the slowest of the four."""
        return max(("compute", "links", "network", "memory"), key=lambda name: getattr(self, name))


def compute_roofline(work: Work, memory_bytes: float, topology: Topology, mesh: MeshShape) -> Times:
    """Computes the roofline of one device's program.

    Fast links connect the devices of a slice of TPUs, the GPUs of one host, or for some chips (GB200) the GPUs of
    several hosts. `Topology.domain` is the number of devices that they connect; None: all devices. A collective that
    reaches beyond these devices goes over the network. Devices that differ only in the last axes of a mesh are
    neighbours.

    Args:
      work: of one device.
      memory_bytes: bytes of memory that the device reads or writes.
      topology: the hardware.
      mesh: the shape of the mesh over its devices.
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
        memory=memory_bytes * chip.devices / chip.memory_rate,
    )
