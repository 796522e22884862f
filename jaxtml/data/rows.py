"""The arrays of one row of training data: their names, shapes and dtypes, and the padding to those shapes.

Datasets make rows with `pad`. All rows of a dataset have the same shapes, those of `row_shapes`, so that one compiled
training step fits them. `jaxtml plan` compiles the step for rows with the most patches that the config allows.

At an own-speech position the model speaks: it reads the 50 ms of own speech that it spoke 200 ms earlier, and predicts
the 50 ms of now (`jaxtml.stream.layout`).

Axis glossary: T positions, C clock features, P patches, S own-speech positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from jaxtml.config import Config
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.images import PATCH
from jaxtml.stream.layout import SPEECH_DIM, EncodedConversation
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, N_MELS

Row = dict[str, np.ndarray]
"""The arrays of one row by name, without a batch axis (see `row_shapes`)."""

_OWN_SPEECH_SHARE = 0.4
"""A row has room for this share of own-speech positions. No generated session has more. Sessions in which the user
types come closest to this limit, because their replies follow each other closely: one in a hundred has 0.33."""


def row_shapes(config: Config, patches: int | None = None) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """Returns the shape and dtype of each array of a row.

    Args:
      config: the resolved config.
      patches: patches of the fullest row of a dataset; None for as many as the config allows.

    | array | shape | dtype | meaning |
    |---|---|---|---|
    | `kind` | `[T]` | uint8 | `PositionKind`; PAD at the end |
    | `ids` | `[T]` | int32 | token ids |
    | `bins` | `[T, 80]` | uint8 | dMel frames |
    | `clock` | `[T, C]` | float32 | clock features of the position's micro-turn |
    | `patches` | `[P, 2, 40, 40, 3]` | float32 | pictures |
    | `target` | `[T]` | int32 | the token to predict |
    | `term` | `[T]` | uint8 | `Term`: the loss term of that prediction, or NONE |
    | `speech_at` | `[S]` | int32 | own-speech positions, then zeros |
    | `speech` | `[S, 400]` | float16 | log-mels in [-7, 2] to predict at `speech_at`, exact to 0.002 |
    | `speech_valid` | `[S]` | bool | True for the own-speech positions of `speech_at`, False for its zeros at the end |
    """
    tokens = config.data.tokens
    own_speech = max_own_speech(tokens)
    patches = max_patches(config) if patches is None else patches
    return {
        "kind": ((tokens,), np.uint8),
        "ids": ((tokens,), np.int32),
        "bins": ((tokens, N_MELS), np.uint8),
        "clock": ((tokens, CLOCK_FEATURES), np.float32),
        "patches": ((patches, 2, PATCH, PATCH, 3), np.float32),
        "target": ((tokens,), np.int32),
        "term": ((tokens,), np.uint8),
        "speech_at": ((own_speech,), np.int32),
        "speech": ((own_speech, SPEECH_DIM), np.float16),
        "speech_valid": ((own_speech,), np.bool_),
    }


def max_patches(config: Config) -> int:
    """Returns the number of patches that a row has room for, see `DataConfig.max_patches`."""
    room = min(config.duplex.max_patches * config.data.turns, config.data.tokens)
    return room if config.data.max_patches is None else min(room, config.data.max_patches)


def max_own_speech(tokens: int) -> int:
    """Returns the number of own-speech positions that a row of `tokens` positions has room for."""
    return FRAMES_PER_MICRO_TURN * int(tokens * _OWN_SPEECH_SHARE / FRAMES_PER_MICRO_TURN)


def pad(encoded: EncodedConversation, config: Config, patches: int | None = None) -> Row:
    """Returns an encoded conversation in the shapes of `row_shapes(config, patches)`, with PAD positions at the end.

    A dataset calls it with the same `patches` for all of its rows.

    Raises:
      ValueError: the conversation has more positions, own-speech positions or patches than a row.
    """
    shapes = row_shapes(config, patches)
    length, spoken = len(encoded.kind), len(encoded.speech_at)
    (tokens,), (own_speech,) = shapes["kind"][0], shapes["speech_at"][0]
    if len(encoded.patches) > shapes["patches"][0][0]:
        raise ValueError(f"{len(encoded.patches)} patches: a row has room for {shapes['patches'][0][0]}")
    if length > tokens or spoken > own_speech:
        raise ValueError(f"{length} positions ({spoken} own speech): a row has {tokens} ({own_speech} own speech)")

    def padded(name: str) -> np.ndarray:
        shape, dtype = shapes[name]
        array = np.zeros(shape, dtype)
        if name == "clock":
            array[:length] = encoded.clock[encoded.micro_turn]
        elif name == "speech_valid":
            array[:spoken] = True
        else:
            values = getattr(encoded, name)
            array[: len(values)] = values
        return array

    return {name: padded(name) for name in shapes}
