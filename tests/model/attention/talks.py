"""Random conversations as kinds of positions, and which tokens a query may see in them, written as plain loops."""

from __future__ import annotations

import numpy as np

from jaxtml.config import AttentionConfig
from jaxtml.stream.tokens import PositionKind

TEXT, TURN, USER, OWN, PATCH = (int(getattr(PositionKind, name)) for name in ("TEXT", "TURN", "USER", "OWN", "PATCH"))


def random_kinds(seed: int, tokens: int, density: float) -> np.ndarray:
    """Returns the kinds `[tokens]` of a conversation; the last micro-turn may be cut anywhere."""
    rng = np.random.default_rng(seed)
    kinds: list[int] = []
    while len(kinds) < tokens:
        kinds += micro_turn(rng, density)
    return np.array(kinds[:tokens], np.uint8)


def micro_turn(rng: np.random.Generator, density: float) -> list[int]:
    """Returns the kinds of one micro-turn. `density` says how often it has text; at times it has patches and speech."""
    typed, heard, said = (rng.random(3) < density / 2) * rng.integers(2, 5, 3)
    patches = int(rng.integers(1, 3) * (rng.random() < 0.2))
    speech = 4 * int(rng.random() < 0.4)
    return [TURN, *[TEXT] * typed, *[PATCH] * patches, *[USER] * 4, *[TEXT] * (heard + said), *[OWN] * speech]


def visible_tokens(config: AttentionConfig, kinds: np.ndarray) -> np.ndarray:
    """Returns which token each query sees, `[T, T]` bool, as `jaxtml.model.attention.retention` says it in words."""
    tokens = len(kinds)
    starts = np.flatnonzero(kinds == TURN)
    visible = np.zeros((tokens, tokens), bool)
    kept: list[int] = []
    for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
        for query in range(start, stop):
            visible[query] = _seen(config, query, tokens, kept)
        if TEXT in kinds[start:stop]:
            kept += [p for p in range(start, stop) if kinds[p] in (TURN, TEXT, PATCH)]
    return visible


def _seen(config: AttentionConfig, query: int, tokens: int, kept: list[int]) -> np.ndarray:
    position = np.arange(tokens)
    last = [p for p in kept if p >= config.pinned][-config.retained :] if config.retained else []
    recent = position > query - config.window
    return (position <= query) & (recent | (position < config.pinned) | np.isin(position, last))
