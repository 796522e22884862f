"""Layers of a few kinds in a row, grouped so that a program holds few bodies: runs of equal layers, blocks that repeat.

Parameters of block b, run r lie under `block{b}/run{r}/...` with two leading dimensions `[repeats, layers]`: a run is
`layers` equal layers in a row, a block is a sequence of runs that occurs `repeats` times. 42 layers of Inkling-Small
compile as five layer bodies. Called by `backbone` and `mtp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx

from jaxtml.model.spec import specs, stack_specs


class LayerKind(NamedTuple):
    """What distinguishes one layer from another."""

    is_global: bool
    is_moe: bool


class LayerRun(NamedTuple):
    """`layers` equal layers in a row."""

    kind: LayerKind
    layers: int


class LayerBlock(NamedTuple):
    """A sequence of runs that occurs `repeats` times; `first` is the index of its first layer."""

    runs: tuple[LayerRun, ...]
    repeats: int
    first: int

    @property
    def layers(self) -> int:
        return sum(run.layers for run in self.runs)


class LayerStack:
    """The layers and their modules. Holds shapes, never arrays."""

    def __init__(self, kinds: Sequence[LayerKind], module: Callable[[LayerKind], nnx.Module]):
        self.blocks = group_layers(kinds)
        self.modules: dict[LayerKind, Any] = {kind: module(kind) for kind in sorted(set(kinds))}
        self.tables = {kind: specs(module) for kind, module in self.modules.items()}

    def specs(self) -> dict[str, Any]:
        """Spec table `{block: {run: {...}}}` with `[repeats, layers]` in front of every shape."""
        return {
            f"block{b}": {
                f"run{r}": stack_specs(self.tables[run.kind], (block.repeats, run.layers), ("block", "layer"))
                for r, run in enumerate(block.runs)
            }
            for b, block in enumerate(self.blocks)
        }

    def layer_index(self, block: int, run: int, repeat: int, layer: int) -> int:
        """Index, in the order of execution, of one layer of the stack."""
        b = self.blocks[block]
        return b.first + repeat * b.layers + sum(r.layers for r in b.runs[:run]) + layer

    def kinds(self) -> list[LayerKind]:
        """The kind of each layer in the order of execution."""
        return [
            run.kind
            for block in self.blocks
            for _ in range(block.repeats)
            for run in block.runs
            for _ in range(run.layers)
        ]


def group_layers(kinds: Sequence[LayerKind]) -> tuple[LayerBlock, ...]:
    """Groups the layers: an irregular beginning, then the period that leaves the fewest bodies to compile."""
    best = (LayerBlock(_runs(kinds), 1, 0),)
    for prefix in range(len(kinds)):
        rest = kinds[prefix:]
        for period in range(1, len(rest) // 2 + 1):
            if len(rest) % period or rest[period:] != rest[:-period]:
                continue
            tail = LayerBlock(_runs(rest[:period]), len(rest) // period, prefix)
            head = (LayerBlock(_runs(kinds[:prefix]), 1, 0),) if prefix else ()
            if _bodies((*head, tail)) < _bodies(best):
                best = (*head, tail)
    return best


def _runs(kinds: Sequence[LayerKind]) -> tuple[LayerRun, ...]:
    runs: list[LayerRun] = []
    for kind in kinds:
        if runs and runs[-1].kind == kind:
            runs[-1] = LayerRun(kind, runs[-1].layers + 1)
        else:
            runs.append(LayerRun(kind, 1))
    return tuple(runs)


def _bodies(blocks: tuple[LayerBlock, ...]) -> int:
    return sum(len(block.runs) for block in blocks)
