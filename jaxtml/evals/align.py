"""Word alignment: which words of a reference were recognised right, substituted, deleted or inserted.

Called by `jaxtml.evals.outcomes` for what the model heard, and by `jaxtml.evals.judge` for what the model said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class AlignedPair(NamedTuple):
    """One step of an alignment.

    Attributes:
      reference: position in the reference; None for an inserted word.
      hypothesis: position in the hypothesis; None for a deleted word.
    """

    reference: int | None
    hypothesis: int | None


def align(
    reference: Sequence[str],
    hypothesis: Sequence[str],
    may_match: Callable[[int, int], bool] = lambda i, j: True,
) -> tuple[AlignedPair, ...]:
    """Returns the alignment with the fewest errors (Levenshtein).

    A substituted, a deleted and an inserted word cost one each.

    Args:
      reference: the words that were said.
      hypothesis: the words that were recognised.
      may_match: whether `hypothesis[j]` can stand for `reference[i]` at all. If not, one is deleted and one inserted.

    Returns:
      Pairs in order. Each position of both sequences is in exactly one pair.
    """
    rows, columns = len(reference), len(hypothesis)
    cost = np.zeros((rows + 1, columns + 1), np.int64)
    cost[:, 0], cost[0] = np.arange(rows + 1), np.arange(columns + 1)
    match_cost = np.full((rows, columns), rows + columns + 1)  # higher than the cost of any alignment
    for i in range(rows):
        for j in range(columns):
            if may_match(i, j):
                match_cost[i, j] = reference[i] != hypothesis[j]
            cost[i + 1, j + 1] = min(cost[i, j] + match_cost[i, j], cost[i, j + 1] + 1, cost[i + 1, j] + 1)
    pairs = []
    i, j = rows, columns
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + match_cost[i - 1, j - 1]:
            i, j = i - 1, j - 1
            pairs.append(AlignedPair(i, j))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            pairs.append(AlignedPair(i, None))
        else:
            j -= 1
            pairs.append(AlignedPair(None, j))
    return tuple(reversed(pairs))


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Returns the number of substituted, deleted and inserted words together."""
    return sum(i is None or j is None or reference[i] != hypothesis[j] for i, j in align(reference, hypothesis))
