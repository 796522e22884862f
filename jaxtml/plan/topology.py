"""Hardware that this machine lacks, such as `v5p:4x4x8` or `h100:2x8`, as devices for which programs can be compiled.

Called by `planning` and `compilation`. TPU topologies come from libtpu, which needs no TPU (package `libtpu`, extra
`plan`). GPU topologies come from JAX's CUDA plugin and a description of the device, which need no GPU
(`jax-cuda12-plugin` and `jax-cuda12-pjrt`, in JAX's own version).
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxtml.errors import InputError
from jaxtml.parallel.chips import CHIPS, Chip

# The shapes in which Google offers TPUs: flat tori, small cubes, and tori made of cubes of 4 x 4 x 4 chips.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CUBE_SIDES = range(4, 25, 4)
_MAX_CHIPS = 9216
_HOSTS = re.compile(r"[1-9]\d{0,3}x[1-9]\d?")  # hosts x GPUs per host
# Without these variables, libtpu asks the cloud for metadata, complains about the answer, and refuses a second process.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Topology:
    """Chips that are connected to each other.

    Attributes:
      chip: the kind of chip.
      shape: the sides of a TPU torus in chips; for GPUs, hosts and GPUs per host.
    """

    chip: Chip
    shape: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> Topology:
        """Reads a topology such as "v5p:4x4x8".

        Raises:
          InputError: the chip is unknown, or does not come in this shape; the message lists what there is.
        """
        name, _, shape = text.partition(":")
        chip = next((chip for chip in CHIPS if chip.name == name), None)
        known = [chip.name for chip in CHIPS]
        if chip is None:
            raise InputError(f"topology {text!r}: no chip {name!r}; there are {', '.join(known)}")
        if chip.gpu is not None and not (_HOSTS.fullmatch(shape) and int(shape.split("x")[1]) <= chip.gpu.per_host):
            raise InputError(
                f"topology {text!r}: write it as {name}:2x{chip.gpu.per_host}, "
                f"two hosts with {chip.gpu.per_host} GPUs each"
            )
        if chip.gpu is None and shape not in _shapes(name):
            raise InputError(f"topology {text!r}: {name} comes as {', '.join(_nearest(name, shape))} and others")
        return Topology(chip, tuple(map(int, shape.split("x"))))

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def domain(self) -> int | None:
        """How many GPUs have fast links to each other; None for TPUs, where fast links connect all chips of a slice."""
        return None if self.chip.gpu is None else max(self.chip.gpu.per_domain, self.shape[1])

    @property
    def platform(self) -> str:
        """The name of the platform in JAX."""
        return "tpu" if self.chip.gpu is None else "cuda"

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def find_devices(self) -> Sequence[Any]:
        """Returns the topology's devices, from which a mesh can be made.

        Raises:
          InputError: the compiler is not installed, or does not accept the topology.
        """
        from jax.experimental import topologies

        options = {}
        if self.chip.gpu is not None:
            options = {
                "topology": f"1x{'x'.join(map(str, self.shape))}",
                "target_config": _gpu_target_config(self.chip),
            }
        environment = dict(os.environ)
        os.environ.update(_LIBTPU | environment)
        try:
            return topologies.get_topology_desc(platform=self.platform, topology_name=str(self), **options).devices
        except Exception as error:  # plugins raise many kinds of errors
            message = " ".join(str(error).split())[:200]
            packages = ("libtpu",) if self.chip.gpu is None else ("jax-cuda12-plugin", "jax-cuda12-pjrt")
            if all(_is_installed(package) for package in packages):
                raise InputError(f"topology {self}: the compiler does not accept it: {message}") from error
            install = f"pip install {' '.join(packages)}"
            raise InputError(f"topology {self}: no compiler for it here ({install}): {message}") from error
        finally:  # no other library should take this process for a process of a pod
            os.environ.clear()
            os.environ.update(environment)


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _gpu_target_config(chip: Chip) -> str:
    """Returns a GPU as XLA's `GpuTargetConfigProto` in text: limits of its generation and the chip's own figures."""
    assert chip.gpu is not None
    gpu = chip.gpu
    device = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": 228 * 2**10, "shared_memory_per_block_optin": 227 * 2**10,
        "threads_per_core_limit": 2048, "core_count": gpu.multiprocessors, "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16, "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(chip.memory_rate), "device_memory_size": int(chip.memory),
        "l2_cache_size": gpu.l2_bytes, "clock_rate_ghz": gpu.clock_ghz,
    }  # fmt: skip
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {gpu.compute_capability} }} }} "
        'platform_name: "CUDA" runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 7 } '
        f'device_description_str: "{chip.kinds[0]}"'
    )


@cache
def _shapes(name: str) -> tuple[str, ...]:
    """Returns the shapes in which a TPU chip comes, smallest first; none for a GPU."""
    if name in ("v5e", "v6e"):
        return _FLAT
    if name not in ("v5p", "tpu7x"):
        return ()
    cubes = (s for s in itertools.combinations_with_replacement(_CUBE_SIDES, 3) if math.prod(s) <= _MAX_CHIPS)
    return (*_SMALL_CUBES, *("x".join(map(str, s)) for s in sorted(cubes, key=math.prod)))


def _nearest(name: str, shape: str) -> list[str]:
    """Returns the four shapes whose number of chips is nearest to that of `shape`."""
    sides = [int(side[:9]) for side in shape.split("x") if side.isdecimal() and int(side[:9])]
    wanted = math.prod(sides) if sides else 1

    def distance(other: str) -> float:
        return abs(math.log(math.prod(map(int, other.split("x"))) / wanted))

    return sorted(_shapes(name), key=distance)[:4]
