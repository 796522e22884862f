"""Which tensor of a release holds which layer of which parameter.

`Released` in `model.spec` has the name and the layout of a tensor. Here the stacks of layers are unrolled: one of our
parameters holds all layers of a run, and a release has a tensor for each layer. Called by the source, the sink, tests
and the makers of golden files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtml.checkpoint.source import Position
from jaxtml.config import Config
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import ParamSpec, Released, flatten


@dataclass(frozen=True)
class ReleasedTensor:
    """One tensor of a release.

    Attributes:
      path: the path of the parameter that the tensor belongs to.
      spec: the spec of that parameter.
      position: the position of the tensor's layer in the parameter.
      name: the name of the tensor in the release.
    """

    path: str
    spec: ParamSpec
    position: Position
    name: str

    @property
    def layout(self) -> Released:
        """How the layout of the tensor differs from ours."""
        assert self.spec.released is not None
        return self.spec.released


def released_tensors(config: Config) -> Iterator[ReleasedTensor]:
    """Yields every tensor of a release of this model, in the order of our parameters."""
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
                number = stack.layer_index(block, run, repeat, layer)
                yield ReleasedTensor(path, spec, (repeat, layer), spec.released.name.format(layer=number))
