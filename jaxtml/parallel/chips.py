"""Published figures of the accelerators for which plans and utilisation are computed, and where they are published.

| chip | source |
|---|---|
| TPU v5e | docs.cloud.google.com/tpu/docs/v5e (links 400 GB/s both ways, 6.4 Tb/s to the network per 256 chips) |
| TPU v5p, v6e, tpu7x | docs.cloud.google.com/tpu/docs/tpu7x, the table that compares the three, read 2026-11-24 |
| H100 SXM | NVIDIA H100 datasheet (dense bf16, 80 GB HBM3, NVLink 900 GB/s, 400 Gb/s InfiniBand per GPU) |
| H200 SXM | NVIDIA H200 datasheet (dense bf16 as H100, 141 GB HBM3e at 4.8 TB/s, NVLink 900 GB/s) |
| GB200 | NVIDIA GB200 NVL72 datasheet (dense bf16 per GPU, 186 GB, NVLink 1,800 GB/s) |

How long a collective takes that sends next to nothing was measured by others:

| chip | measured | source |
|---|---|---|
| TPU, a hop over a link | about 1 us | jax-ml.github.io/scaling-book/sharding, "A note on ICI latency" |
| TPU v5e | all_gather of 32 kB shards over 4 chips, 3 hops: 8 us | the same page, the answer to Pop Quiz 2 |
| TPU v5p | ppermute of up to 16 kB, one hop: 4.5 to 5.5 us | github.com/marin-community/marin/issues/6736 |
| TPU v6e | ppermute of up to 16 kB, one hop: 5.6 to 5.9 us | the same issue |
| H100 | all_reduce of up to 1 MiB over the 8 GPUs of a host: 20 to 25 us | the same issue |

`launch_s` is what remains without the hops. Nobody has published it for tpu7x, H200 and GB200, nor between hosts of
GPUs: there it is the figure of v6e or H100.

Names of TPUs follow docs.cloud.google.com/tpu/docs: "v5p-256" and "tpu7x-256" count TensorCores, "v6e-16" and
"v5litepod-16" count chips. An H200 is an H100 with other memory.

The trainer's progress line and `jaxtml plan` read the figures. The kernels of the model use `TPU_LANES`.
"""

from __future__ import annotations

from dataclasses import dataclass

GB, TERA, US = 1e9, 1e12, 1e-6
TPU_LANES = 128  # columns of a TPU's vector register: a kernel takes only sizes that are multiples of it


@dataclass(frozen=True)
class Gpu:
    """What only a GPU has: the figures with which XLA compiles for an absent GPU, and how many GPUs form a host.

    Attributes:
      compute_capability: major number of NVIDIA's compute capability.
      multiprocessors: streaming multiprocessors.
      l2_bytes: bytes of second-level cache.
      clock_ghz: clock rate in GHz.
      per_host: GPUs of one host, at most.
      per_domain: the number of GPUs with fast links to each other, if these GPUs span several hosts; otherwise 0.
    """

    compute_capability: int
    multiprocessors: int
    l2_bytes: int
    clock_ghz: float
    per_host: int
    per_domain: int = 0


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as a topology names it ("v5p").
      kinds: what JAX calls a device of this chip (`device_kind`).
      flops: dense bfloat16 FLOP/s.
      memory: bytes of high-bandwidth memory.
      memory_rate: bytes/s of that memory.
      link_rate: bytes/s to the neighbours over all links of one chip, in one direction.
      network_rate: bytes/s to other slices or nodes, per chip, in one direction.
      launch_s: seconds that a collective takes besides its bytes and hops.
      hop_s: seconds of a hop from one chip to its neighbour; 0 for GPUs, which a switch connects.
      devices: JAX devices per chip.
      cores: TensorCores per chip, if names such as "v5p-256" count TensorCores; 1 if they count chips.
      aliases: other names of the chip in topologies.
      gpu: what only a GPU has; None: the chip is a TPU.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float
    launch_s: float
    hop_s: float
    devices: int = 1
    gpu: Gpu | None = None
    cores: int = 1
    aliases: tuple[str, ...] = ()


_NCCL = (22.5 * US, 0)  # `launch_s` and `hop_s`
_H100 = Gpu(9, 132, 50 * 2**20, 1.98, per_host=8)
_GB200 = Gpu(10, 148, 126 * 2**20, 1.965, per_host=4, per_domain=72)
CHIPS = (
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        197 * TERA,
        16 * 2**30,
        819 * GB,
        200 * GB,
        3.1 * GB,
        5.0 * US,
        US,
        aliases=("v5litepod", "v5lite"),
    ),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459 * TERA, 95 * 2**30, 2765 * GB, 600 * GB, 6.25 * GB, 4.0 * US, US, cores=2),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918 * TERA, 32 * 2**30, 1638 * GB, 400 * GB, 12.5 * GB, 4.7 * US, US),
    Chip(
        "tpu7x",
        ("TPU7x", "TPU v7x", "TPU v7"),
        2307 * TERA,
        192 * 2**30,
        7380 * GB,
        600 * GB,
        12.5 * GB,
        4.7 * US,
        US,
        2,
        cores=2,
        aliases=("v7x", "tpuv7x"),
    ),
    Chip(
        "h100", ("NVIDIA H100 80GB HBM3",), 989 * TERA, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 22.5 * US, 0, gpu=_H100
    ),
    Chip("h200", ("NVIDIA H200",), 989 * TERA, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 22.5 * US, 0, gpu=_H100),
    Chip("gb200", ("NVIDIA GB200",), 2500 * TERA, 186 * GB, 8000 * GB, 900 * GB, 50 * GB, 22.5 * US, 0, gpu=_GB200),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip to which JAX's `device_kind` belongs; None where the table has none, for example on a CPU."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
