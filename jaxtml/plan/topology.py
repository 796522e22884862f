"""Hardware that is not here: `v5p:4x4x8` as devices to compile for. Called by `plan`.

TPU topologies come from libtpu, which needs no TPU (package `libtpu`, extra `plan`).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxtml.errors import InputError
from jaxtml.parallel.chips import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CUBE_SIDES = range(4, 25, 4)  # sides of what is put together from cubes of 4 x 4 x 4
_LARGEST = 9216  # chips


@dataclass(frozen=True)
class Topology:
    """`chip` in a torus of `shape`; JAX sees `devices` devices."""

    chip: Chip
    shape: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> Topology:
        """`"v5p:4x4x8"` -> the topology.

        Raises:
          InputError: an unknown chip, or a shape in which it does not come; the message lists what there is.
        """
        name, _, shape = text.partition(":")
        chip = next((chip for chip in CHIPS if chip.name == name), None)
        known = [chip.name for chip in CHIPS if _shapes(chip.name)]
        if chip is None or not _shapes(name):
            raise InputError(f"topology {text!r}: no chip {name!r}; there are {', '.join(known)}")
        if shape not in _shapes(name):
            raise InputError(f"topology {text!r}: {name} comes as {', '.join(_nearest(name, shape))} and others")
        return Topology(chip, tuple(map(int, shape.split("x"))))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def found(self) -> Sequence[Any]:
        """Its devices, to make a mesh of.

        Raises:
          InputError: libtpu is not installed, or does not know the topology.
        """
        # Without these libtpu asks the cloud who it is, and refuses a second process.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=str(self)).devices
        except Exception as error:  # plugins raise many kinds
            said = " ".join(str(error).split())[:200]
            raise InputError(f"topology {self}: libtpu gives no such devices (pip install libtpu): {said}") from error


@cache
def _shapes(name: str) -> tuple[str, ...]:
    """The shapes in which a chip comes, smallest first."""
    if name in ("v5e", "v6e"):
        return _FLAT
    if name not in ("v5p", "tpu7x"):
        return ()
    cubes = (s for s in itertools.combinations_with_replacement(_CUBE_SIDES, 3) if math.prod(s) <= _LARGEST)
    return (*_SMALL_CUBES, *("x".join(map(str, s)) for s in sorted(cubes, key=math.prod)))


def _nearest(name: str, shape: str) -> list[str]:
    """Four shapes of about as many chips as `shape` asks for."""
    sides = [int(side) for side in shape.split("x") if side.isdecimal() and int(side)]
    wanted = math.prod(sides) if sides else 1

    def distance(other: str) -> float:
        return abs(math.log(math.prod(map(int, other.split("x"))) / wanted))

    return sorted(_shapes(name), key=distance)[:4]
