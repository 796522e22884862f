"""Two sequences of words side by side: which were right, taken for another, left out or put in.

Called by `jaxtml.evals.thresholds` for what the model heard, and by `jaxtml.evals.judge` for what the model said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """One step of an alignment: positions in the true and in the given sequence; None where one has nothing."""

    true: int | None
    given: int | None


def align(
    true: Sequence[str], given: Sequence[str], may_match: Callable[[int, int], bool] = lambda i, j: True
) -> tuple[Pair, ...]:
    """The alignment with the fewest errors (Levenshtein: a wrong, a missing and an added word cost one each).

    Args:
      true: what was said.
      given: what was understood.
      may_match: whether `given[j]` can stand for `true[i]` at all; if not, one is missing and one was added.

    Returns:
      Pairs in order; each position of both sequences is in exactly one.
    """
    rows, columns = len(true), len(given)
    cost = np.zeros((rows + 1, columns + 1), np.int64)
    cost[:, 0], cost[0] = np.arange(rows + 1), np.arange(columns + 1)
    together = np.full((rows, columns), rows + columns + 1)  # dearer than any alignment
    for i in range(rows):
        for j in range(columns):
            if may_match(i, j):
                together[i, j] = true[i] != given[j]
            cost[i + 1, j + 1] = min(cost[i, j] + together[i, j], cost[i, j + 1] + 1, cost[i + 1, j] + 1)
    pairs = []
    i, j = rows, columns
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + together[i - 1, j - 1]:
            i, j = i - 1, j - 1
            pairs.append(Pair(i, j))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            pairs.append(Pair(i, None))
        else:
            j -= 1
            pairs.append(Pair(None, j))
    return tuple(reversed(pairs))


def word_errors(true: Sequence[str], given: Sequence[str]) -> int:
    """Wrong, missing and added words together."""
    pairs = align(true, given)
    return sum(pair.true is None or pair.given is None or true[pair.true] != given[pair.given] for pair in pairs)
