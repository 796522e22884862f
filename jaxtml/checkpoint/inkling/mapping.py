"""Which tensor of a release holds what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxtml.config import Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import ParamSpec, flatten


class ReleasedTensor(NamedTuple):
    """One released tensor: our path, the index in the stacked dimensions, the released name."""

    path: str
    spec: ParamSpec
    index: tuple[int, ...]
    name: str


def released_tensors(config: Config) -> Iterator[ReleasedTensor]:
    """Every tensor of the released layout, in the order of our table."""
    model = InteractionModel(config)
    for path, spec in flatten(model.specs()):
        if spec.released is None:
            continue
        if not spec.stacked:
            yield ReleasedTensor(path, spec, (), spec.released.name)
            continue
        stack = model.mtp if path.startswith("mtp/") else model.backbone
        assert stack is not None
        block, run = (int(part.removeprefix("block").removeprefix("run")) for part in path.split("/")[1:3])
        for repeat in range(spec.shape[0]):
            for layer in range(spec.shape[1]):
                index = stack.layer_index(block, run, repeat, layer)
                yield ReleasedTensor(path, spec, (repeat, layer), spec.released.name.format(layer=index))
