"""Inkling's plan of folds."""

from __future__ import annotations

import math

from jaxtml.errors import InputError


def default_folds(depth: int) -> tuple[tuple[int, int, int], ...]:
    """Inkling's own plan of `depth` folds of 2 x 40 x 40 x 3 pixels: `(time, side, width)` each, the last width 0.

    The sides grow by prime factors, then time; widths are the pixels seen, rounded up to 64. `depth` of these six
    stages are kept: the ones whose logarithms lie nearest to even steps, the first and the last always.
    """
    stages = [(1, 1, 3), (1, 5, 128), (1, 10, 320), (1, 20, 1216), (1, 40, 4800), (2, 40, 9600)]
    if not 1 <= depth < len(stages):
        raise InputError(f"config.json: a vision tower of {depth} layers is not supported; Inkling's has 4")
    total = math.log(2 * 40 * 40 * 3)
    cost = [[abs(total * i / depth - math.log(t * side * side)) for t, side, _ in stages] for i in range(depth + 1)]
    # Both rows and columns rise, so a cheapest assignment never crosses: best[j] = cheapest with row i on stage <= j.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(stages) + 1)
    for i in range(depth + 1):
        row: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for j in range(len(stages)):
            before, chosen = best[j]
            row.append(min(row[-1], (before + cost[i][j], (*chosen, j))))
        best = row
    chosen = (0, *best[-1][1][1:-1], len(stages) - 1)
    kept = [stages[j] for j in chosen]
    folds = [(b[0] // a[0], b[1] // a[1], b[2]) for a, b in zip(kept[:-1], kept[1:], strict=True)]
    return (*folds[:-1], (*folds[-1][:2], 0))
