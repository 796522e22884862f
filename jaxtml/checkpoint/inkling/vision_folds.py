"""The layers ("folds") of Inkling's vision tower, which follow from the number of layers alone.

Called by `checkpoint.inkling.config`: a released config has no field for them.
"""

from __future__ import annotations

import math

from jaxtml.errors import InputError

# A tower begins with pixels and merges neighbours, layer by layer. At stage `(time, side, width)`, a vector of `width`
# channels stands for `time` frames of `side` x `side` pixels. Sides grow by the prime factors of 40, then time grows.
# The width is the number of values in these pixels, rounded up to a multiple of 64.
_STAGES = [(1, 1, 3), (1, 5, 128), (1, 10, 320), (1, 20, 1216), (1, 40, 4800), (2, 40, 9600)]
_PIXELS = 2 * 40 * 40


def default_folds(depth: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the folds `(time, side, width)` of a vision tower of `depth` layers.

    The last width is 0, which stands for the width of the model.

    A layer goes from one of six stages to a later one, the first layer from the first stage and the last layer to the
    last. Inkling takes the `depth + 1` stages that are nearest to even steps in the logarithm of the number of pixels.

    Raises:
      InputError: there is no such tower.
    """
    if not 1 <= depth < len(_STAGES):
        raise InputError(
            f"config.json: jaxtml supports vision towers of 1 to {len(_STAGES) - 1} layers; this one has {depth}"
        )
    kept = [_STAGES[stage] for stage in _nearest_stages(depth)]
    folds = [
        (later[0] // earlier[0], later[1] // earlier[1], later[2])
        for earlier, later in zip(kept[:-1], kept[1:], strict=True)
    ]
    return (*folds[:-1], (*folds[-1][:2], 0))


def _nearest_stages(depth: int) -> tuple[int, ...]:
    """Returns the indices of the `depth + 1` stages that are nearest to even logarithmic steps."""
    total = math.log(_PIXELS * 3)
    distance = [
        [abs(total * step / depth - math.log(time * side * side)) for time, side, _ in _STAGES]
        for step in range(depth + 1)
    ]
    # Dynamic programming: each step takes a stage, and later steps take later stages. best[j] is a pair: the least sum
    # of distances of the steps so far, and their stages. These steps take only stages before stage j.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(_STAGES) + 1)
    for step in range(depth + 1):
        row: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for stage in range(len(_STAGES)):
            before, chosen = best[stage]
            row.append(min(row[-1], (before + distance[step][stage], (*chosen, stage))))
        best = row
    return (0, *best[-1][1][1:-1], len(_STAGES) - 1)
