"""Hardware that this machine lacks, such as `v5p:4x4x8` or `h100:2x8`, as devices for which programs can be compiled.

`Topology.parse` also reads the names that clouds and users have for the same hardware, such as `v5p-256` or `8xh200`.

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
# A number of slices or GPUs, the chip, and its shape or a number of chips, TensorCores or GPUs.
_TOPOLOGY = re.compile(r"(?:([1-9]\d{0,4})x)?(?:tpu-)?([a-z][a-z0-9]*)(?:([:-])(.*))?")
_NUMBER = re.compile(r"[1-9]\d{0,6}")
_MOST_SLICES = 1024
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
      slices: how many such tori a network connects; 1 for GPUs.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @staticmethod
    def parse(text: str) -> Topology:
        """Reads a topology such as "v5p:4x4x8", or one of the names that users have for it.

        | name | means |
        |---|---|
        | `v5p:4x4x8`, `v6e:4x4` | one slice of TPUs of this shape |
        | `v5p-256`, `tpu7x-256` | one slice with this number of TensorCores, which is two for each chip |
        | `v6e-16`, `v5litepod-16` | one slice with this number of chips |
        | `2xv5p:4x4x8`, `2xv5p-256` | two slices that a network connects |
        | `h100:2x8` | two hosts with eight GPUs each |
        | `h200`, `8xh200`, `h200-8` | one GPU; eight GPUs, on as few hosts as possible |

        Raises:
          InputError: the chip is unknown, or does not come in this shape; the message lists what there is.
        """
        match = _TOPOLOGY.fullmatch(text.strip().lower())
        name = match[2] if match else text
        chip = next((chip for chip in CHIPS if name == chip.name or name in chip.aliases), None)
        if match is None or chip is None:
            known = ", ".join(chip.name for chip in CHIPS)
            raise InputError(f"topology {text!r}: no chip {name!r}; there are {known}, for example v5p:4x4x8 or 8xh200")
        count, separator, rest = match[1], match[3], match[4] or ""
        if chip.gpu is not None:
            return Topology(chip, _gpu_shape(text, chip, count, separator, rest))
        slices = int(count or 1)
        if slices > _MOST_SLICES:
            raise InputError(f"topology {text!r}: give at most {_MOST_SLICES} slices")
        number = separator == "-" and _NUMBER.fullmatch(rest) is not None
        shape = _shape_of_size(text, chip, int(rest)) if number else _tpu_shape(text, chip, rest)
        return Topology(chip, shape, slices)

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def domain(self) -> int | None:
        """How many devices have fast links to each other; None if all have, as in one slice of TPUs."""
        if self.chip.gpu is not None:
            return max(self.chip.gpu.per_domain, self.shape[1])
        return None if self.slices == 1 else self.devices // self.slices

    def larger(self) -> list[Topology]:
        """Returns topologies of the same chip with two to eight times as many chips, the smallest first."""
        if self.chip.gpu is not None:
            hosts, gpus = self.shape
            return [Topology(self.chip, (times * hosts, gpus)) for times in (2, 4, 8)]
        shapes = [tuple(map(int, shape.split("x"))) for shape in _shapes(self.chip.name)]
        cubes = {math.prod(shape): shape for shape in sorted(shapes, key=sum, reverse=True)}  # nearest to a cube
        now = math.prod(self.shape)
        return [Topology(self.chip, cubes[n], self.slices) for n in sorted(cubes) if 2 * now <= n <= 8 * now]

    @property
    def platform(self) -> str:
        """The name of the platform in JAX."""
        return "tpu" if self.chip.gpu is None else "cuda"

    def __str__(self) -> str:
        return f"{self.slices}x{self._slice_name}" if self.slices > 1 else self._slice_name

    @property
    def _slice_name(self) -> str:
        """The name of one slice, or of the GPUs, as JAX's plugins read it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def find_devices(self) -> Sequence[Any]:
        """Returns the topology's devices, from which a mesh can be made.

        Raises:
          InputError: the compiler is not installed, or does not accept the topology.
        """
        from jax.experimental import topologies

        options: dict[str, Any] = {} if self.slices == 1 else {"num_slices": self.slices}
        if self.chip.gpu is not None:
            options = {
                "topology": f"1x{'x'.join(map(str, self.shape))}",
                "target_config": _gpu_target_config(self.chip),
            }
        environment = dict(os.environ)
        os.environ.update(_LIBTPU | environment)
        try:
            return topologies.get_topology_desc(
                platform=self.platform, topology_name=self._slice_name, **options
            ).devices
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


def _gpu_shape(text: str, chip: Chip, count: str | None, separator: str | None, rest: str) -> tuple[int, int]:
    """Returns hosts and GPUs per host of a topology of GPUs, whose parts are those of `_TOPOLOGY`."""
    assert chip.gpu is not None
    most = chip.gpu.per_host
    if count is None and separator == ":" and _HOSTS.fullmatch(rest) and int(rest.split("x")[1]) <= most:
        hosts, gpus = map(int, rest.split("x"))
        return hosts, gpus
    number = rest if count is None and separator == "-" else (count or "1") if separator is None else ""
    if not _NUMBER.fullmatch(number):
        raise InputError(
            f"topology {text!r}: write it as {chip.name}:2x{most}, two hosts with {most} GPUs each, "
            f"or as {2 * most}x{chip.name}"
        )
    if int(number) > most and int(number) % most:
        raise InputError(
            f"topology {text!r}: a host has at most {most} GPUs, so give a multiple of {most}, or "
            f"{chip.name}:HOSTSxGPUS"
        )
    return max(1, int(number) // most), min(int(number), most)


def _tpu_shape(text: str, chip: Chip, written: str) -> tuple[int, ...]:
    """Returns the sides of a slice that is written as its sides, in any order."""
    sides = sorted(written.split("x"))
    for shape in _shapes(chip.name):
        if sorted(shape.split("x")) == sides:
            return tuple(map(int, shape.split("x")))
    numbers = [int(side[:9]) for side in written.split("x") if side.isdecimal() and int(side[:9])]
    nearest = _nearest(chip.name, math.prod(numbers) if numbers else 1)
    raise InputError(
        f"topology {text!r}: {chip.name} comes as {', '.join(nearest)} and others; write it as {chip.name}:{nearest[0]}"
    )


def _shape_of_size(text: str, chip: Chip, size: int) -> tuple[int, ...]:
    """Returns the sides of the slice that a name such as "v5p-256" stands for: of this size, the nearest to a cube."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in _shapes(chip.name)]
    fitting = [shape for shape in shapes if math.prod(shape) * chip.cores == size]
    if not fitting:
        sizes = {math.prod(map(int, near.split("x"))) for near in _nearest(chip.name, size / chip.cores)}
        names = ", ".join(f"{chip.name}-{chips * chip.cores}" for chips in sorted(sizes))
        unit = "TensorCores, two for each chip" if chip.cores == 2 else "chips"
        raise InputError(f"topology {text!r}: this name counts {unit}, and {chip.name} comes as {names} and others")
    return min(fitting, key=sum)


@cache
def _shapes(name: str) -> tuple[str, ...]:
    """Returns the shapes in which a TPU chip comes, smallest first; none for a GPU."""
    if name in ("v5e", "v6e"):
        return _FLAT
    if name not in ("v5p", "tpu7x"):
        return ()
    cubes = (s for s in itertools.combinations_with_replacement(_CUBE_SIDES, 3) if math.prod(s) <= _MAX_CHIPS)
    return (*_SMALL_CUBES, *("x".join(map(str, s)) for s in sorted(cubes, key=math.prod)))


def _nearest(name: str, chips: float) -> list[str]:
    """Returns the four shapes whose number of chips is nearest to `chips`."""

    def distance(shape: str) -> float:
        return abs(math.log(math.prod(map(int, shape.split("x"))) / chips))

    return sorted(_shapes(name), key=distance)[:4]
