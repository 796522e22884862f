"""A model that begins as another one: layers that the other lacks change nothing, what speech needs starts neutral.

So `tml_interaction_small` begins with Inkling-Small's weights: layers 42 and 43 are copies of the last ones of their
kind whose output projections are zero, so that on text its logits are Inkling's. The clock and the own-voice embedding
are zero, control tokens whose rows are empty get random ones. Called by `convert.conversion` and `train.storage`.
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

# What a warm start may change; all else is the shape of the weights.
_FREE = ("n_layers", "global_layers", "unpadded_vocab_size", "init_std", "mtp_heads", "mtp_global")
_OUTPUTS = ("attn/wo", "mlp/w2", "mlp/shared_w2")  # zero, a layer adds nothing
_SAMPLED = 4096  # rows of the embedding whose size control tokens take

Where = tuple[str, tuple[int, int]]  # "layers/block0/run1", (repeat, layer)


class WarmStart:
    """A `checkpoint.source.ParameterSource` for `config` over one of a model with the same backbone and no more layers.

    Raises:
      InputError: the backbones differ in more than their number of layers; the first difference is named.
    """

    def __init__(self, source: ParameterSource, config: Config, seed: int = 0):
        self.source, self.config, self.seed = source, config, seed
        self.table, self.theirs = spec_table(config), spec_table(source.config)
        _check(source.config, config)
        kinds = InteractionModel(source.config).backbone.kinds()
        self.held = _places(source.config)
        self.layers: dict[Where, tuple[Where, bool]] = {}  # ours -> theirs, and whether it is to change nothing
        for index, (kind, where) in enumerate(
            zip(InteractionModel(config).backbone.kinds(), _places(config), strict=True)
        ):
            new = index >= len(kinds)
            alike = [i for i, other in enumerate(kinds) if other == kind]
            if not alike or (not new and kinds[index] != kind):
                raise InputError(
                    f"{config.name} has a layer {index} of a kind that {source.config.name} has none of there"
                )
            self.layers[where] = self.held[alike[-1] if new else index], new
        self._dtypes = {path: self._joined(path) for path in self.table}

    def dtype(self, path: str) -> np.dtype:
        return self._dtypes[path]

    def _joined(self, path: str) -> np.dtype:
        """That of a parameter; of one in layers, which need not be alike (a release is float32 in places), the least
        that holds all that are copied."""
        if not path.startswith("layers/"):
            return self.source.dtype(path) if self._copied(path) else np.dtype(np.float32)
        _, block, run, name = path.split("/", 3)
        ours = f"layers/{block}/{run}"
        copied = sorted({theirs[0] for (where, _), (theirs, _) in self.layers.items() if where == ours})
        return reduce(jnp.promote_types, (self.source.dtype(f"{prefix}/{name}") for prefix in copied))

    def holds(self, path: str) -> bool:
        return path.startswith("layers/") or (self._copied(path) and self.source.holds(path))

    def read(self, path: str, index: Index) -> np.ndarray:
        if not path.startswith("layers/"):
            if not self._copied(path):
                return initial_values(path, self.table[path], self.seed, index)
            found = self.source.read(path, index)
            return self._with_controls(found, index) if path == "embed/weight" else found
        _, block, run, name = path.split("/", 3)
        out = np.empty(index_shape(index, self.table[path].shape), self.dtype(path))
        spans = [range(*cut.indices(n)) for cut, n in zip(index[:2], self.table[path].shape[:2], strict=True)]
        for i, repeat in enumerate(spans[0]):
            for j, layer in enumerate(spans[1]):
                (prefix, at), new = self.layers[f"layers/{block}/{run}", (repeat, layer)]
                if new and name in _OUTPUTS:
                    out[i, j] = 0
                else:
                    place = (*(slice(n, n + 1) for n in at), *index[2:])
                    part = self.source.read(f"{prefix}/{name}", place)[0, 0]
                    copy_contiguous(part.astype(out.dtype, copy=False), out[i, j])
        return out

    def _copied(self, path: str) -> bool:
        """Whether a parameter outside the layers is the source's."""
        return path in self.theirs and self.theirs[path].shape == self.table[path].shape

    def _with_controls(self, rows: np.ndarray, index: Index) -> np.ndarray:
        """Some rows of the embedding. All-zero ones would make every control token the same after the norm."""
        first, last, _ = index[0].indices(self.table["embed/weight"].shape[0])
        base = self.config.duplex.control_base
        for token in range(max(first, base), min(last, base + CONTROLS)):
            if not rows[token - first].any():
                spec = self.theirs["embed/weight"]
                sample = self.source.read("embed/weight", (slice(min(_SAMPLED, base)), *full_index(spec)[1:]))
                scale = float(np.sqrt(np.mean(np.square(sample.astype(np.float32)))))
                drawn = np.random.default_rng((self.seed, token)).normal(0.0, scale, spec.shape[1])
                rows[token - first] = drawn[index[1]].astype(rows.dtype)
        return rows


def _places(config: Config) -> list[Where]:
    """Where each layer stands in the stacks, in the order of execution."""
    backbone = InteractionModel(config).backbone
    found: dict[int, Where] = {}
    for b, block in enumerate(backbone.blocks):
        for r, run in enumerate(block.runs):
            for repeat in range(block.repeats):
                for layer in range(run.layers):
                    found[backbone.layer_index(b, r, repeat, layer)] = f"layers/block{b}/run{r}", (repeat, layer)
    return [found[i] for i in range(len(found))]


def _check(theirs: Config, ours: Config) -> None:
    def compared(b: BackboneConfig) -> BackboneConfig:
        return dataclasses.replace(b, **{name: getattr(ours.backbone, name) for name in _FREE})

    if ours.backbone.n_layers < theirs.backbone.n_layers:
        raise InputError(f"{ours.name} has {ours.backbone.n_layers} layers, {theirs.name} {theirs.backbone.n_layers}")
    a, b = compared(theirs.backbone), ours.backbone
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("sliding", "global_"):  # a window and pinned tokens are no shape of a weight
            one = dataclasses.replace(one, window=other.window, pinned=other.pinned)
        if one != other:
            raise InputError(
                f"{ours.name} cannot begin as {theirs.name}: backbone.{field.name} is {other}, theirs {one}"
            )
    if theirs.vision != ours.vision:
        raise InputError(f"{ours.name} cannot begin as {theirs.name}: their vision towers differ")
