"""`jaxtml plan --search`: the largest batch that fits, for every remat; the largest number of sessions, to serve.

Memory grows nearly in proportion to the batch: two compilations tell where the limit should be, and compilations around
it where it is. Called by `plan`; knows no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = dict[str, Any]
AROUND = 4  # further compilations, at most, where the estimate is not the limit


def largest(measure: Callable[[int], Report | None]) -> tuple[int, Report] | None:
    """The largest n for which `measure(n)` finds a program that fits, as far as `AROUND` lets it look; None: not one.

    Args:
      measure: n times the smallest batch -> its report with `bytes_per_chip` and `chip_memory_bytes`; None where it
        does not fit.
    """
    first = measure(1)
    if first is None:
        return None
    second = measure(2)
    if second is None:
        return 1, first
    best, found, too_much = 2, second, None
    slope = max(second["bytes_per_chip"] - first["bytes_per_chip"], 1)
    guess = max(3, 1 + (first["chip_memory_bytes"] - first["bytes_per_chip"]) // slope)
    for _ in range(1 + AROUND):
        report = measure(guess)
        if report is not None:
            best, found = guess, report
        else:
            too_much = guess
        if too_much is not None and too_much - best <= 1:
            break
        guess = best + 1 if too_much is None else (best + too_much) // 2
    return best, found


def search(kinds: list[str], measure: Callable[[str, int], Report | None]) -> list[tuple[str, int, Report]]:
    """(kind, n, report) of the largest n of each kind that fits at all, the most tokens a second first."""
    found = []
    for kind in kinds:
        most = largest(lambda n, kind=kind: measure(kind, n))
        if most is not None:
            found.append((kind, *most))
    return sorted(found, key=lambda one: -one[2]["tokens_per_s_per_chip"])
