"""What one device's program does, counted on its jaxpr: FLOPs and bytes sent, with every loop as often as it runs.

XLA's own `cost_analysis` counts the body of a loop once, and the text of a compiled pod program cannot always be had.
The collectives of a `jax.shard_map` program stand in its jaxpr, each with its axes. Called by `plan` and by tests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var


@dataclass
class Work:
    """Counts of one run.

    Attributes:
      flops: of matrix products, kernels' own estimates included.
      sent: bytes that a device sends, by (collective, axes).
      open_loops: loops without a known number of rounds, counted as one round each.
    """

    flops: float = 0.0
    sent: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    open_loops: int = 0

    def scaled(self, factor: float) -> Work:
        """The work of so many such runs."""
        work = Work()
        work.add(self, factor)
        return work

    def add(self, other: Work, times: float = 1) -> None:
        self.flops += times * other.flops
        self.open_loops += other.open_loops
        for key, size in other.sent.items():
            self.sent[key] += times * size  # pyright: ignore[reportArgumentType] (a share of an odd size)


def count_work(function: Any, *arguments: Any, platform: str) -> Work:
    """Work of `function(*arguments)` on one device; arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      function: anything that `jax.jit` takes.
      platform: "cpu", "tpu" or "cuda": whose branch of `jax.lax.platform_dependent` counts.
    """
    return count_jaxpr_work(jax.jit(function).trace(*arguments).jaxpr, platform)


def count_jaxpr_work(jaxpr: ClosedJaxpr, platform: str, rounds: int = 1, least: bool = False) -> Work:
    """Work of a traced program, as `jax.jit(f).trace(...).jaxpr`.

    Args:
      jaxpr: the program.
      platform: as for `count_work`.
      rounds: how often a loop without a known number of rounds runs.
      least: of the branches of a condition that multiply anything count the cheapest, not the dearest.
    """
    return _count(jaxpr.jaxpr, _Reading(platform, rounds, least), {})


class _Reading(NamedTuple):
    """How a jaxpr is read."""

    platform: str
    rounds: int
    least: bool

    def choose(self, branches: list[Work]) -> Work:
        working = [branch for branch in branches if branch.flops] or branches
        return (min if self.least else max)(working, key=lambda branch: branch.flops)


def _count(jaxpr: Jaxpr, reading: _Reading, axes: dict[str, int]) -> Work:
    work, platform = Work(), reading.platform
    chosen: dict[Any, int] = {}  # results of platform_index
    eqn: Any
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "platform_index":
            chosen[eqn.outvars[0]] = _branch(params["platforms"], platform)
        elif name == "convert_element_type" and isinstance(eqn.invars[0], Var) and eqn.invars[0] in chosen:
            chosen[eqn.outvars[0]] = chosen[eqn.invars[0]]
        elif name == "clamp" and isinstance(eqn.invars[1], Var) and eqn.invars[1] in chosen:
            chosen[eqn.outvars[0]] = chosen[eqn.invars[1]]
        elif name == "cond":
            index = chosen.get(eqn.invars[0]) if isinstance(eqn.invars[0], Var) else None
            branches = params["branches"] if index is None else params["branches"][index : index + 1]
            found = [_count(branch.jaxpr, reading, axes) for branch in branches]
            work.add(reading.choose(found))
        elif name == "scan":
            work.add(_count(params["jaxpr"].jaxpr, reading, axes), params["length"])
        elif name == "while":
            work.add(_count(params["body_jaxpr"].jaxpr, reading, axes), reading.rounds)
            work.open_loops += 1
        elif name == "shard_map":
            sizes = dict(params["mesh"].shape)
            work.add(_count(params["jaxpr"], reading, {**axes, **sizes}))
        elif name == "dot_general":
            work.flops += _dot_flops(eqn)
        elif name.startswith("ragged_dot"):
            rows, width = eqn.invars[0].aval.shape
            work.flops += 2 * rows * width * eqn.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            work.flops += estimate.flops if estimate else 0
        elif name in _SENT:
            names = params.get("axes") or params.get("axis_name")
            names = (names,) if isinstance(names, str) else tuple(names)
            ways = math.prod(axes[axis] for axis in names)
            whole = sum(_bytes(v) for v in (eqn.outvars if name == "all_gather" else eqn.invars[: _OPERANDS.get(name)]))
            work.sent[_KIND.get(name, name), names] += _SENT[name](whole, ways)  # pyright: ignore[reportArgumentType]
        else:
            for inner in _inner(params):
                work.add(_count(inner, reading, axes))
    return work


# Bytes that each of n devices sends, for a whole of so many bytes (ring algorithms).
_SENT = {
    "all_gather": lambda whole, n: whole * (n - 1) / n,
    "reduce_scatter": lambda whole, n: whole * (n - 1) / n,
    "psum": lambda whole, n: 2 * whole * (n - 1) / n,
    "psum_invariant": lambda whole, n: 2 * whole * (n - 1) / n,
    "pmax": lambda whole, n: 2 * whole * (n - 1) / n,
    "all_to_all": lambda whole, n: whole * (n - 1) / n,
    "ragged_all_to_all": lambda whole, n: whole * (n - 1) / n,
    "ppermute": lambda whole, n: whole,
}
_KIND = {"psum": "all_reduce", "psum_invariant": "all_reduce", "pmax": "all_reduce"}
_OPERANDS = {"ragged_all_to_all": 1}  # the others are buffer and offsets


def _branch(platforms: Any, platform: str) -> int:
    """Which branch of `platform_dependent` is for `platform`; the one for all others comes as None."""
    for index, names in enumerate(platforms):
        if names is None or platform in names:
            return index
    raise ValueError(f"no branch for {platform} among {platforms}")


def _dot_flops(eqn: Any) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)


def _bytes(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


def _inner(params: Mapping[str, Any]) -> list[Jaxpr]:
    """Jaxprs inside a call: `jit`, `checkpoint`, custom derivatives ..."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found
