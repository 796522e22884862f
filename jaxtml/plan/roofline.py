"""The roofline: the least time that a program can take on a chip, from its work and the chip's published figures.

The time of a step is that of the slowest of four things, as if everything else were hidden behind it: matrix products
at the published peak, bytes over links, bytes over the network between slices or hosts, and bytes of memory, each at
its published rate. The latency of the collectives is counted beside it, because in serving nothing hides it. A real
step is slower: kernels have latencies too, and no rate is reached. Called by `report`.
"""

from __future__ import annotations

import itertools
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
    """Seconds that a step would take if only one thing bounded it, and the latency that comes on top.

    Attributes:
      compute: matrix products.
      links: bytes sent over links inside a slice, or between GPUs with fast links.
      network: bytes sent between slices or hosts.
      memory: bytes of memory that are read or written.
      latency: what the collectives would take if they sent nothing.
    """

    compute: float
    links: float
    network: float
    memory: float
    latency: float

    @property
    def step(self) -> float:
        """Seconds of a step without latency: those of the slowest of the four."""
        return max(self.compute, self.links, self.network, self.memory)

    @property
    def bound(self) -> str:
        """The name of the slowest of the four."""
        return max(("compute", "links", "network", "memory"), key=lambda name: getattr(self, name))


def compute_roofline(work: Work, memory_bytes: float, topology: Topology, mesh: MeshShape) -> Times:
    """Computes the roofline of one device's program.

    Fast links connect the devices of a slice of TPUs, the GPUs of one host, or for some chips (GB200) the GPUs of
    several hosts. `Topology.domain` is the number of devices that they connect; None: all devices. A collective that
    reaches beyond these devices goes over the network.

    Args:
      work: of one device.
      memory_bytes: bytes of memory that the device reads or writes.
      topology: the hardware.
      mesh: the shape of the mesh over its devices.
    """
    chip = topology.chip
    crossing = sum(size * _crossing_share(*key, topology, mesh) for key, size in work.sent.items())
    return Times(
        compute=work.flops * chip.devices / chip.flops,
        links=sum(work.sent.values()) * chip.devices / chip.link_rate,
        network=crossing * chip.devices / chip.network_rate,
        memory=memory_bytes * chip.devices / chip.memory_rate,
        latency=sum(times * collective_latency(*key, topology, mesh) for key, times in work.calls.items()),
    )


def collective_latency(kind: str, axes: tuple[str, ...], topology: Topology, mesh: MeshShape) -> float:
    """Returns the seconds that a collective would take if it sent nothing.

    Each mesh axis counts as a line of neighbours, over which a number travels from one end to the other. An all_reduce
    crosses the lines twice: to be summed, and to be brought to all devices.
    """
    hops = sum(mesh.sizes[axis] - 1 for axis in axes)
    return topology.chip.launch_s + hops * topology.chip.hop_s * (2 if kind == "all_reduce" else 1)


def _crossing_share(kind: str, axes: tuple[str, ...], topology: Topology, mesh: MeshShape) -> float:
    """Returns the share of the bytes that a device sends in a collective which goes over the network.

    Devices that differ only in the last axes of a mesh are neighbours. A collective first works between the devices
    that fast links connect. So what has to cross the network crosses once, and these devices share it.
    """
    sizes = [mesh.sizes[axis] for axis in AXES]
    strides = {axis: math.prod(sizes[i + 1 :]) for i, axis in enumerate(AXES)}
    steps = ([i * strides[axis] for i in range(mesh.sizes[axis])] for axis in axes)
    members = [sum(step) for step in itertools.product(*steps)]
    near = sum(member < (topology.domain or math.inf) for member in members)
    domains = len(members) // near
    if domains == 1:
        return 0
    # A device sends the share (n - 1) / n of a collective's bytes, or of twice these bytes.
    crossing = (domains - 1) / domains / ((len(members) - 1) / len(members))
    return min(1, crossing if kind in ("all_to_all", "ragged_all_to_all", "ppermute") else crossing / near)
