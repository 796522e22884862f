"""A larger model that starts with the weights of a smaller one. On text, its logits are those of the smaller model.

For example, `tml_interaction_small` starts with the weights of Inkling-Small, which has two layers fewer. The added
layers, 42 and 43, are copies of the last layers of their kinds. Their output projections are zero, so that the added
layers add nothing. A parameter outside the layers gets the initial values of a new model if the source does not have it
in the same shape. For the embedding of the clock features, and for the embedding that marks the model's own speech,
these are zeros. Control tokens whose rows of the embedding are all zero get random rows.

Called by `convert.conversion` and `train.parameters`.
"""

from __future__ import annotations

import dataclasses
from functools import reduce

import jax.numpy as jnp
import numpy as np

from jaxtml.checkpoint.source import Index, ParameterSource, full_index, index_shape, spec_table
from jaxtml.checkpoint.transposed_copy import copy_contiguous
from jaxtml.config import BackboneConfig, Config
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import initial_values
from jaxtml.stream.tokens import CONTROLS

# Fields of the backbone that may differ. Every other field decides the shape of weights or the result of a layer.
_FREE = ("n_layers", "global_layers", "unpadded_vocab_size", "init_std", "mtp_heads", "mtp_global")
_OUTPUTS = ("attn/wo", "mlp/w2", "mlp/shared_w2")  # output projections: a layer adds nothing if these are zero
_SAMPLE_ROWS = 4096  # rows of the embedding; the random rows of control tokens get the root mean square of these rows


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """Where a layer stands in the stacks of a model: the path of its run of equal layers, and its position in the run.

    Example: `LayerPlace("layers/block0/run1", (3, 0))`.
    """

    run: str
    position: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class LayerOrigin:
    """Where a layer of the larger model comes from.

    Attributes:
      place: where the layer that is copied stands in the smaller model.
      added: whether the smaller model has no layer of this number. An added layer adds nothing until it is trained.
    """

    place: LayerPlace
    added: bool


class WarmStart:
    """A `ParameterSource` of a larger model, whose weights come from a smaller model with the same kinds of layers.

    Args:
      source: the source of the smaller model's parameters. The smaller model has at most as many layers as the larger.
      config: the config of the larger model.
      seed: the seed of all random values.

    Attributes:
      layers: the origin of each layer.

    Raises:
      InputError: the backbones differ in more than their layers. The message names the first difference.
    """

    def __init__(self, source: ParameterSource, config: Config, seed: int = 0):
        self.source, self.config, self.seed = source, config, seed
        self.specs, self.source_specs = spec_table(config), spec_table(source.config)
        _check_backbones(source.config, config)
        self.layers = _layer_origins(source.config, config)
        self._dtypes = {path: self._choose_dtype(path) for path in self.specs}

    def dtype(self, path: str) -> np.dtype:
        return self._dtypes[path]

    def holds(self, path: str) -> bool:
        return path.startswith("layers/") or (self._is_copied(path) and self.source.holds(path))

    def read(self, path: str, index: Index) -> np.ndarray:
        if path.startswith("layers/"):
            return self._read_layers(path, index)
        if not self._is_copied(path):
            return initial_values(path, self.specs[path], self.seed, index)
        values = self.source.read(path, index)
        return self._fill_control_rows(values, index) if path == "embed/weight" else values

    def _read_layers(self, path: str, index: Index) -> np.ndarray:
        run, name = _split_layer_path(path)
        shape = self.specs[path].shape
        out = np.empty(index_shape(index, shape), self.dtype(path))
        repeats, layers = (range(*cut.indices(size)) for cut, size in zip(index[:2], shape[:2], strict=True))
        for i, repeat in enumerate(repeats):
            for j, layer in enumerate(layers):
                origin = self.layers[LayerPlace(run, (repeat, layer))]
                if origin.added and name in _OUTPUTS:
                    out[i, j] = 0
                    continue
                source_index = (*(slice(n, n + 1) for n in origin.place.position), *index[2:])
                values = self.source.read(f"{origin.place.run}/{name}", source_index)[0, 0]
                copy_contiguous(values.astype(out.dtype, copy=False), out[i, j])
        return out

    def _is_copied(self, path: str) -> bool:
        """Returns whether a parameter outside the layers has the shape that it has in the source."""
        return path in self.source_specs and self.source_specs[path].shape == self.specs[path].shape

    def _choose_dtype(self, path: str) -> np.dtype:
        """Returns the dtype of a parameter: the smallest that can represent the values copied from all layers.

        Layers of the source may have different dtypes, because some tensors of a release are float32.
        """
        if not path.startswith("layers/"):
            return self.source.dtype(path) if self._is_copied(path) else np.dtype(np.float32)
        run, name = _split_layer_path(path)
        source_runs = {origin.place.run for place, origin in self.layers.items() if place.run == run}
        return reduce(jnp.promote_types, (self.source.dtype(f"{run}/{name}") for run in sorted(source_runs)))

    def _fill_control_rows(self, rows: np.ndarray, index: Index) -> np.ndarray:
        """Replaces rows of control tokens that are all zero by random rows. Returns `rows`.

        All control tokens with zero rows would be the same to the model.

        Args:
          rows: a part of the embedding; changed in place.
          index: the index of this part in the embedding.
        """
        first, last, _ = index[0].indices(self.specs["embed/weight"].shape[0])
        base = self.config.duplex.control_base
        for token in range(max(first, base), min(last, base + CONTROLS)):
            if not rows[token - first].any():
                spec = self.source_specs["embed/weight"]
                sample = self.source.read("embed/weight", (slice(min(_SAMPLE_ROWS, base)), *full_index(spec)[1:]))
                scale = float(np.sqrt(np.mean(np.square(sample.astype(np.float32)))))
                row = np.random.default_rng((self.seed, token)).normal(0.0, scale, spec.shape[1])
                rows[token - first] = row[index[1]].astype(rows.dtype)
        return rows


def _split_layer_path(path: str) -> tuple[str, str]:
    """Returns the path of a layer's run, and the parameter's name in the layer."""
    _, block, run, name = path.split("/", 3)
    return f"layers/{block}/{run}", name


def _check_backbones(source: Config, target: Config) -> None:
    """Raises `InputError` unless the weights of `source` fit into `target`."""
    refused = f"{target.name} cannot start with the weights of {source.name}"
    if target.backbone.n_layers < source.backbone.n_layers:
        raise InputError(
            f"{refused}: it has {target.backbone.n_layers} layers, and {source.name} has {source.backbone.n_layers}"
        )
    for field in dataclasses.fields(BackboneConfig):
        if field.name in _FREE:
            continue
        theirs, ours = getattr(source.backbone, field.name), getattr(target.backbone, field.name)
        if field.name in ("sliding", "global_"):  # which tokens are visible decides no shape
            theirs = dataclasses.replace(theirs, window=ours.window, pinned=ours.pinned, retained=ours.retained)
        if theirs != ours:
            raise InputError(f"{refused}: backbone.{field.name} is {ours}, and {theirs} in {source.name}")
    if source.vision != target.vision:
        raise InputError(f"{refused}: their vision towers differ")


def _layer_origins(source: Config, target: Config) -> dict[LayerPlace, LayerOrigin]:
    """Returns the origin of each layer of `target`. A layer that `source` lacks comes from the last one of its kind."""
    source_kinds = InteractionModel(source).backbone.kinds()
    source_places = _layer_places(source)
    kinds = InteractionModel(target).backbone.kinds()
    origins: dict[LayerPlace, LayerOrigin] = {}
    for number, (kind, place) in enumerate(zip(kinds, _layer_places(target), strict=True)):
        added = number >= len(source_kinds)
        same_kind = [i for i, source_kind in enumerate(source_kinds) if source_kind == kind]
        if not same_kind or (not added and source_kinds[number] != kind):
            raise InputError(
                f"{target.name} cannot start with the weights of {source.name}: "
                f"its layer {number} is of a kind that {source.name} does not have there"
            )
        origins[place] = LayerOrigin(source_places[same_kind[-1] if added else number], added)
    return origins


def _layer_places(config: Config) -> list[LayerPlace]:
    """Returns where each layer stands in the stacks, in the order in which layers run."""
    backbone = InteractionModel(config).backbone
    places: dict[int, LayerPlace] = {}
    for b, block in enumerate(backbone.blocks):
        for r, run in enumerate(block.runs):
            for repeat in range(block.repeats):
                for layer in range(run.layers):
                    number = backbone.layer_index(b, r, repeat, layer)
                    places[number] = LayerPlace(f"layers/block{b}/run{r}", (repeat, layer))
    return [places[number] for number in range(len(places))]
