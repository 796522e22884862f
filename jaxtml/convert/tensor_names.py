"""The names of tensors in messages. Called by the conversion and the verification."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxtml.checkpoint.chunks import LayerChunks
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.source import ParameterSource


def source_names(source: ParameterSource, work: Sequence[LayerChunks], layers: Collection[str]) -> list[str]:
    """Returns the names of `layers` for a message, sorted.

    A layer has the name of its tensor if the source is a release and has this tensor. Otherwise it has our name.

    Args:
      source: the source of the parameters.
      work: all layers of all parameters.
      layers: our names of some of them (`LayerChunks.name`).
    """
    tensors = source.tensors if isinstance(source, ReleasedCheckpoint) else {}
    named = {layer.name: tensors.get((layer.path, layer.position)) for layer in work if layer.name in layers}
    return sorted(name if tensor is None else tensor.name for name, tensor in named.items())
