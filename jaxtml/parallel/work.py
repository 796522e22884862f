"""Counts the work of one device's program on its jaxpr: FLOPs and bytes sent, each loop as often as it runs.

Called by `jaxtml plan` and by tests. Two other sources are not enough: XLA's `cost_analysis` counts the body of a loop
once, and the text of a compiled pod program is not always available. The jaxpr of a `jax.shard_map` program names every
collective with its mesh axes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var


@dataclass
class Work:
    """The work of one run of a program on one device.

    Attributes:
      flops: FLOPs of matrix products; for a Pallas kernel, its own estimate.
      sent: bytes that the device sends, by (collective, mesh axes).
      open_loops: loops whose number of rounds is not known; see `count_jaxpr_work`.
    """

    flops: float = 0.0
    sent: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    open_loops: int = 0

    def scaled(self, factor: float) -> Work:
        """Returns the work of `factor` runs."""
        work = Work()
        work.add(self, factor)
        return work

    def add(self, other: Work, times: float = 1) -> None:
        """Adds `other`, done `times` times. `open_loops` counts loops in the program, so it is not multiplied."""
        self.flops += times * other.flops
        self.open_loops += other.open_loops
        for key, size in other.sent.items():
            self.sent[key] += times * size  # pyright: ignore[reportArgumentType] (bytes need not be whole numbers)


def count_work(function: Callable[..., Any], *arguments: Any, platform: str) -> Work:
    """Counts the work of `function(*arguments)` on one device; arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      function: anything that `jax.jit` takes.
      arguments: arrays, shapes, or trees of them.
      platform: "cpu", "tpu" or "cuda": the platform whose branch of `jax.lax.platform_dependent` counts.
    """
    return count_jaxpr_work(jax.jit(function).trace(*arguments).jaxpr, platform)


def count_jaxpr_work(jaxpr: ClosedJaxpr, platform: str, rounds: int = 1, least: bool = False) -> Work:
    """Counts the work of a traced program.

    Args:
      jaxpr: the program, as `jax.jit(f).trace(...).jaxpr`.
      platform: as for `count_work`.
      rounds: how many rounds to count of a loop whose number of rounds is not known.
      least: at a condition, counts the cheapest branch instead of the dearest. If any branch has matrix products, the
        branches without matrix products are left out.
    """
    return _count(jaxpr.jaxpr, _Options(platform, rounds, least), {})


class _Options(NamedTuple):
    """How a jaxpr is counted: the arguments of `count_jaxpr_work`."""

    platform: str
    rounds: int
    least: bool

    def choose(self, branches: list[Work]) -> Work:
        """Returns the work of a condition: that of its dearest branch or, with `least`, of its cheapest branch."""
        working = [branch for branch in branches if branch.flops] or branches
        return (min if self.least else max)(working, key=lambda branch: branch.flops)


def _count(jaxpr: Jaxpr, options: _Options, axis_sizes: dict[str, int]) -> Work:
    """Counts one jaxpr and all jaxprs inside it; `axis_sizes` are those of the enclosing `shard_map`s."""
    work = Work()
    # The variables that choose a branch by platform, and the index of this branch. JAX traces a `platform_dependent` as
    # a `platform_index`, which makes such a variable, and a `cond`, which reads it.
    branch_of: dict[Any, int] = {}
    eqn: Any
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "platform_index":
            branch_of[eqn.outvars[0]] = _branch(params["platforms"], options.platform)
        elif name == "convert_element_type" and isinstance(eqn.invars[0], Var) and eqn.invars[0] in branch_of:
            branch_of[eqn.outvars[0]] = branch_of[eqn.invars[0]]
        elif name == "clamp" and isinstance(eqn.invars[1], Var) and eqn.invars[1] in branch_of:
            branch_of[eqn.outvars[0]] = branch_of[eqn.invars[1]]
        elif name == "cond":
            index = branch_of.get(eqn.invars[0]) if isinstance(eqn.invars[0], Var) else None
            branches = params["branches"] if index is None else params["branches"][index : index + 1]
            work.add(options.choose([_count(branch.jaxpr, options, axis_sizes) for branch in branches]))
        elif name == "scan":
            work.add(_count(params["jaxpr"].jaxpr, options, axis_sizes), params["length"])
        elif name == "while":
            work.add(_count(params["body_jaxpr"].jaxpr, options, axis_sizes), options.rounds)
            work.open_loops += 1
        elif name == "shard_map":
            work.add(_count(params["jaxpr"], options, {**axis_sizes, **dict(params["mesh"].shape)}))
        elif name == "dot_general":
            work.flops += _dot_flops(eqn)
        elif name.startswith("ragged_dot"):
            rows, width = eqn.invars[0].aval.shape
            work.flops += 2 * rows * width * eqn.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            work.flops += estimate.flops if estimate else 0
        elif name in _SENT_BYTES:
            axes = params.get("axes") or params.get("axis_name")
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            devices = math.prod(axis_sizes[axis] for axis in axes)
            sent = _SENT_BYTES[name](_collective_bytes(eqn), devices)
            work.sent[_KIND.get(name, name), axes] += sent  # pyright: ignore[reportArgumentType]
        else:
            for inner in _inner_jaxprs(params):
                work.add(_count(inner, options, axis_sizes))
    return work


# Bytes that each of n devices sends in a collective over `size` bytes, by the ring algorithms.
_SENT_BYTES: dict[str, Callable[[int, int], float]] = {
    "all_gather": lambda size, n: size * (n - 1) / n,
    "reduce_scatter": lambda size, n: size * (n - 1) / n,
    "psum": lambda size, n: 2 * size * (n - 1) / n,
    "psum_invariant": lambda size, n: 2 * size * (n - 1) / n,
    "pmax": lambda size, n: 2 * size * (n - 1) / n,
    "all_to_all": lambda size, n: size * (n - 1) / n,
    "ragged_all_to_all": lambda size, n: size * (n - 1) / n,
    "ppermute": lambda size, n: size,
}
_KIND = {"psum": "all_reduce", "psum_invariant": "all_reduce", "pmax": "all_reduce"}
_DATA_OPERANDS = {"ragged_all_to_all": 1}  # its other operands are the output buffer and the offsets


def _collective_bytes(eqn: Any) -> int:
    """Returns the bytes of a collective's complete value: the result of an all_gather, the operands of the others."""
    name = eqn.primitive.name
    variables = eqn.outvars if name == "all_gather" else eqn.invars[: _DATA_OPERANDS.get(name)]
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)


def _branch(platforms: Any, platform: str) -> int:
    """Returns the index of the branch of `platform_dependent` for `platform`; the default branch is listed as None."""
    for index, names in enumerate(platforms):
        if names is None or platform in names:
            return index
    raise ValueError(f"no branch for {platform} among {platforms}")


def _dot_flops(eqn: Any) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)


def _inner_jaxprs(params: Mapping[str, Any]) -> list[Jaxpr]:
    """Returns the jaxprs inside a call, for example of `jit`, `checkpoint` or a custom derivative."""
    jaxprs = []
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, ClosedJaxpr):
                jaxprs.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                jaxprs.append(part)
    return jaxprs
