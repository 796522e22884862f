"""Counts the work of one device's program on its jaxpr: FLOPs, collectives and bytes, each loop as often as it runs.

Called by `jaxtml plan` and by tests. Two other sources are not enough: XLA's `cost_analysis` counts the body of a loop
once, and the text of a compiled pod program is not always available. The jaxpr of a `jax.shard_map` program names every
collective with its mesh axes.

A program may branch, and its loops may end when a condition says so. A `Case` decides the branches and the rounds. The
rules are about forward passes of the backbone, which `Backbone` marks (`mark_pass`):

| in the jaxpr | counted |
|---|---|
| a condition whose branches all have passes | the branch with the most positions; the fewest unless `Case.widest` |
| a condition inside a loop of known length | the branch with the most FLOPs: what happens inside a pass |
| any other condition | the branch with the most FLOPs; the fewest unless `Case.speaks` |
| a loop of unknown length | `Case.rounds` rounds |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

_PASS = "forward pass"


def mark_pass(x: jax.Array) -> jax.Array:
    """Returns `x` `[B, T, D]`, the input of a forward pass; marks the pass in the jaxpr, and nowhere else."""
    return checkpoint_name(x, _PASS)


@dataclass
class Work:
    """The work of one run of a program on one device.

    Attributes:
      flops: FLOPs of matrix products; for a Pallas kernel, its own estimate.
      sent: bytes that the device sends, by (collective, mesh axes).
      calls: how many collectives there are, by (collective, mesh axes).
      passes: how many forward passes there are, by (sequences of the device, positions of a sequence).
      read: bytes of the weights that are read, each as often as an operation uses it.
      open_loops: loops whose number of rounds is not known; see `Case`.
    """

    flops: float = 0.0
    sent: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    calls: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    passes: Counter[tuple[int, int]] = field(default_factory=Counter)
    read: float = 0.0
    open_loops: int = 0

    @property
    def positions(self) -> int:
        """The positions of one sequence in all passes together."""
        return sum(positions * times for (_, positions), times in self.passes.items())

    def scaled(self, factor: float) -> Work:
        """Returns the work with `factor` times the sequences: FLOPs and bytes sent grow, everything else stays."""
        sent = Counter({key: size * factor for key, size in self.sent.items()})
        return Work(self.flops * factor, sent, self.calls, self.passes, self.read, self.open_loops)  # pyright: ignore[reportArgumentType]

    def minus(self, other: Work) -> Work:
        """Returns the difference between this work and `other`, which is a part of it."""
        work = Work()
        work.add(self)
        work.add(other, -1)
        return work

    def add(self, other: Work, times: float = 1) -> None:
        """Adds `other`, done `times` times. `open_loops` counts loops in the program, so it is not multiplied."""
        self.flops += times * other.flops
        self.read += times * other.read
        self.open_loops += other.open_loops
        for name in ("sent", "calls", "passes"):
            total: Counter[Any] = getattr(self, name)
            for key, value in getattr(other, name).items():
                total[key] += times * value  # pyright: ignore[reportArgumentType] (bytes need not be whole numbers)


class Case(NamedTuple):
    """Which branches and how many rounds of a program are counted; the table at the top of this file has the rules.

    Attributes:
      rounds: of a loop whose number of rounds is not known.
      widest: whether forward passes get the longest inputs that the program can give them.
      speaks: whether the other conditions take the branch with the most work. In a server's program, these are the
        branches that compute own speech.
    """

    rounds: int = 1
    widest: bool = True
    speaks: bool = True


def count_work(function: Callable[..., Any], *arguments: Any, platform: str) -> Work:
    """Counts the work of `function(*arguments)` on one device; arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      function: anything that `jax.jit` takes.
      arguments: arrays, shapes, or trees of them.
      platform: "cpu", "tpu" or "cuda": the platform whose branch of `jax.lax.platform_dependent` counts.
    """
    return count_jaxpr_work(jax.jit(function).trace(*arguments).jaxpr, platform)


DEAREST = Case()
"""The branches with the most work, and one round of each loop."""


def count_jaxpr_work(
    jaxpr: ClosedJaxpr, platform: str, case: Case = DEAREST, weights: Sequence[bool] | None = None
) -> Work:
    """Counts the work of a traced program.

    Args:
      jaxpr: the program, as `jax.jit(f).trace(...).jaxpr`.
      platform: as for `count_work`.
      case: which branches and how many rounds to count.
      weights: for each input of the jaxpr, whether it is a weight whose reading counts. The list may be shorter than
        the inputs: the last inputs are then no weights. None: no input is a weight.
    """
    chosen = {v: v.aval.dtype.itemsize for v, counts in zip(jaxpr.jaxpr.invars, weights or (), strict=False) if counts}
    return _Counter(platform, case).count(jaxpr.jaxpr, _Known({}, chosen, {}))


class _Known(NamedTuple):
    """What is known about a jaxpr from the jaxprs around it, and about its variables. Counting adds variables.

    Attributes:
      axis_sizes: lengths of the mesh axes of the enclosing `shard_map`s.
      weights: the variables that hold a weight or a part of one, and the bytes that one of its numbers has in memory.
      branch_of: the variables that choose a branch by platform, and the index of this branch. JAX traces a
        `platform_dependent` as a `platform_index`, which makes such a variable, and a `cond`, which reads it.
      in_scan: whether a loop of known length is around the jaxpr.
    """

    axis_sizes: dict[str, int]
    weights: dict[Any, int]
    branch_of: dict[Any, int]
    in_scan: bool = False

    def inside(self, jaxpr: Jaxpr, operands: Sequence[Any], scan: bool = False, **axis_sizes: int) -> _Known:
        """Returns what is known inside an equation, about a jaxpr whose inputs are `operands`."""
        pairs = list(zip(jaxpr.invars, operands, strict=True))
        weights, branch_of = (
            {v: known[o] for v, o in pairs if _is_in(o, known)} for known in (self.weights, self.branch_of)
        )
        return _Known({**self.axis_sizes, **axis_sizes}, weights, branch_of, self.in_scan or scan)


# Operations that only select, reorder or convert numbers. If the operand is a weight, so is the result: it is read
# where another operation computes with it. So of the operand of a `gather`, only the rows of the result are read.
_LAYOUT = {
    *("convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice", "gather"),
    *("split", "copy", "optimization_barrier", "name"),
}


@dataclass(frozen=True)
class _Counter:
    """Counts jaxprs; the attributes are arguments of `count_jaxpr_work`."""

    platform: str
    case: Case

    def count(self, jaxpr: Jaxpr, known: _Known) -> Work:
        """Counts one jaxpr and all jaxprs inside it."""
        work, branch_of = Work(), known.branch_of
        eqn: Any
        for eqn in jaxpr.eqns:
            name, params, operands = eqn.primitive.name, eqn.params, eqn.invars
            if name == "platform_index":
                branch_of[eqn.outvars[0]] = _branch(params["platforms"], self.platform)
            elif name in ("convert_element_type", "clamp") and any(_is_in(v, branch_of) for v in operands):
                branch_of[eqn.outvars[0]] = next(branch_of[v] for v in operands if _is_in(v, branch_of))
            elif name == "cond":
                branches = params["branches"]
                if _is_in(operands[0], branch_of):
                    branches = [branches[branch_of[operands[0]]]]
                inside = [self.count(one.jaxpr, known.inside(one.jaxpr, operands[1:])) for one in branches]
                work.add(self._choose(inside, known.in_scan))
            elif name == "scan":
                body = params["jaxpr"].jaxpr
                work.add(self.count(body, known.inside(body, operands, scan=True)), params["length"])
            elif name == "while":
                work.add(self._loop(eqn, known))
            elif name == "shard_map":
                body = params["jaxpr"]
                work.add(self.count(body, known.inside(body, operands, **dict(params["mesh"].shape))))
            elif name in _SENT_BYTES:
                _add_collective(work, eqn, known.axis_sizes)
            elif inner := [] if name == "pallas_call" else _inner_jaxprs(params):
                for body in inner:
                    work.add(self._call(body, eqn, known))
            else:
                _add_operation(work, eqn, known.weights)
        return work

    def _call(self, body: Jaxpr, eqn: Any, known: _Known) -> Work:
        """Returns the work of a jaxpr inside a call, for example of `jit`. Its results may be parts of weights."""
        same = len(body.invars) == len(eqn.invars)
        inside = known.inside(body, eqn.invars if same else [None] * len(body.invars))
        work = self.count(body, inside)
        if same:
            results = zip(body.outvars, eqn.outvars, strict=False)
            known.weights.update({after: inside.weights[v] for v, after in results if _is_in(v, inside.weights)})
        return work

    def _choose(self, branches: list[Work], in_scan: bool) -> Work:
        """Returns the work of one of the branches of a condition; the top of this file has the rules."""
        if all(branch.passes for branch in branches):
            return (max if self.case.widest else min)(branches, key=lambda work: work.positions)
        return (max if self.case.speaks or in_scan else min)(branches, key=lambda work: work.flops)

    def _loop(self, eqn: Any, known: _Known) -> Work:
        """Returns the work of a loop of `Case.rounds` rounds; its condition is computed once more."""
        params, operands, work = eqn.params, eqn.invars, Work(open_loops=1)
        first = params["cond_nconsts"]
        last = first + params["body_nconsts"]
        body, condition = params["body_jaxpr"].jaxpr, params["cond_jaxpr"].jaxpr
        work.add(self.count(body, known.inside(body, operands[first:])), self.case.rounds)
        work.add(
            self.count(condition, known.inside(condition, [*operands[:first], *operands[last:]])), self.case.rounds + 1
        )
        return work


def _is_in(variable: Any, known: Mapping[Any, Any]) -> bool:
    """Returns whether an operand is a variable of `known`; an operand may be a literal, which cannot be looked up."""
    return isinstance(variable, Var) and variable in known


def _add_operation(work: Work, eqn: Any, weights: dict[Any, int]) -> None:
    """Adds one operation that is neither a collective nor has jaxprs inside."""
    name, params = eqn.primitive.name, eqn.params
    if name == "name" and params["name"] == _PASS:
        batch, positions, _ = eqn.invars[0].aval.shape
        work.passes[batch, positions] += 1
    if name == "dot_general":
        work.flops += _dot_flops(eqn)
    elif name.startswith("ragged_dot"):
        rows, width = eqn.invars[0].aval.shape
        work.flops += 2 * rows * width * eqn.outvars[0].aval.shape[-1]
    elif name == "pallas_call":
        estimate = params.get("cost_estimate")
        work.flops += estimate.flops if estimate else 0
    read = [v for v in eqn.invars if _is_in(v, weights)]
    if read and name in _LAYOUT:
        weights.update(dict.fromkeys(eqn.outvars, weights[read[0]]))
    else:
        work.read += sum(math.prod(v.aval.shape) * weights[v] for v in read)


def _add_collective(work: Work, eqn: Any, axis_sizes: Mapping[str, int]) -> None:
    """Adds one collective."""
    name: str = eqn.primitive.name
    axes = eqn.params.get("axes") or eqn.params.get("axis_name")
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    devices = math.prod(axis_sizes[axis] for axis in axes)
    key = _KIND.get(name, name), axes
    work.sent[key] += _SENT_BYTES[name](_collective_bytes(eqn), devices)  # pyright: ignore[reportArgumentType]
    work.calls[key] += 1


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
_KIND: dict[str, str] = {"psum": "all_reduce", "psum_invariant": "all_reduce", "pmax": "all_reduce"}
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
