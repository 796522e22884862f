"""A sequence of layers of a few kinds, grouped so that a compiled program contains few layer bodies.

A run is a number of equal layers in a row. A block is a sequence of runs that occurs `repeats` times. The parameters of
run r of block b lie under `block{b}/run{r}/...`, with two leading dimensions `[repeats, layers]`. The 42 layers of
Inkling-Small compile as five layer bodies. Called by `backbone` and `mtp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx

from jaxtml.model.spec import SpecTable, specs, stack_specs


class LayerKind(NamedTuple):
    """What distinguishes one layer from another: global attention or sliding, experts or dense feed-forward."""

    is_global: bool
    is_moe: bool


class LayerRun(NamedTuple):
    """A number of equal layers in a row."""

    kind: LayerKind
    layers: int


class LayerBlock(NamedTuple):
    """A sequence of runs that occurs `repeats` times; `first` is the index of its first layer."""

    runs: tuple[LayerRun, ...]
    repeats: int
    first: int

    @property
    def layers(self) -> int:
        """The number of layers in one occurrence of the block."""
        return sum(run.layers for run in self.runs)


class LayerStack:
    """The layers in groups, and one module for each kind of layer. Holds shapes, never arrays."""

    def __init__(self, kinds: Sequence[LayerKind], module: Callable[[LayerKind], nnx.Module]):
        """Groups the layers.

        Args:
          kinds: the kind of each layer, in the order of execution.
          module: makes the module of a kind.
        """
        self.blocks = group_layers(kinds)
        self.modules: dict[LayerKind, Any] = {kind: module(kind) for kind in sorted(set(kinds))}
        self.tables = {kind: specs(module) for kind, module in self.modules.items()}

    def specs(self) -> SpecTable:
        """Returns the spec table `{block: {run: {...}}}` with `[repeats, layers]` in front of every shape."""
        return {
            f"block{b}": {
                f"run{r}": stack_specs(self.tables[run.kind], (block.repeats, run.layers), ("block", "layer"))
                for r, run in enumerate(block.runs)
            }
            for b, block in enumerate(self.blocks)
        }

    def layer_index(self, block: int, run: int, repeat: int, layer: int) -> int:
        """Returns the index, in the order of execution, of one layer of the stack."""
        b = self.blocks[block]
        return b.first + repeat * b.layers + sum(r.layers for r in b.runs[:run]) + layer

    def kinds(self) -> list[LayerKind]:
        """Returns the kind of each layer in the order of execution."""
        return [
            run.kind
            for block in self.blocks
            for _ in range(block.repeats)
            for run in block.runs
            for _ in range(run.layers)
        ]


def group_layers(kinds: Sequence[LayerKind]) -> tuple[LayerBlock, ...]:
    """Groups layers into an irregular beginning and a period that repeats, so that the fewest bodies are compiled."""
    best = (LayerBlock(_runs(kinds), 1, 0),)
    for prefix in range(len(kinds)):
        rest = kinds[prefix:]
        for period in range(1, len(rest) // 2 + 1):
            if len(rest) % period or rest[period:] != rest[:-period]:
                continue
            repeated = LayerBlock(_runs(rest[:period]), len(rest) // period, prefix)
            beginning = (LayerBlock(_runs(kinds[:prefix]), 1, 0),) if prefix else ()
            if _count_bodies((*beginning, repeated)) < _count_bodies(best):
                best = (*beginning, repeated)
    return best


def _runs(kinds: Sequence[LayerKind]) -> tuple[LayerRun, ...]:
    runs: list[LayerRun] = []
    for kind in kinds:
        if runs and runs[-1].kind == kind:
            runs[-1] = LayerRun(kind, runs[-1].layers + 1)
        else:
            runs.append(LayerRun(kind, 1))
    return tuple(runs)


def _count_bodies(blocks: tuple[LayerBlock, ...]) -> int:
    return sum(len(block.runs) for block in blocks)
