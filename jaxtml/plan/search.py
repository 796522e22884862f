"""`jaxtml plan --search`: the largest batch that fits, for every remat; the largest number of sessions, to serve.

Memory grows nearly in proportion to the batch, but small ones may be padded to one size: sizes are doubled, or more
where the last two say so, until one does not fit, and then narrowed down. Called by `plan`; knows no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = dict[str, Any]
MAX_TRIES = 10  # compilations of one kind, at most
MAX_GROWTH = 8  # times the largest size known to fit, at most


def find_largest(measure: Callable[[int], Report | None], first: int = 1) -> tuple[int, Report] | None:
    """The largest n, within `MAX_TRIES` tries, for which `measure(n)` finds a program that fits; None: there is none.

    Args:
      measure: n times the smallest batch -> its report with `bytes_per_chip` and `chip_memory_bytes`; None where it
        does not fit.
      first: the n to begin with.
    """
    fits: dict[int, Report] = {}
    too_much, guess = None, first
    for _ in range(MAX_TRIES):
        report = measure(guess)
        if report is None:
            too_much = guess
        else:
            fits[guess] = report
        best = max(fits, default=0)
        if too_much is not None and too_much - best <= 1:
            break
        guess = _next(fits, best, too_much)
    return (best, fits[best]) if fits else None


def _next(fits: dict[int, Report], best: int, too_much: int | None) -> int:
    """The size to try next: what the two largest that fit make likely, within what is known."""
    likely = 2 * best
    if len(fits) > 1:
        before = sorted(fits)[-2]
        size, smaller = fits[best]["bytes_per_chip"], fits[before]["bytes_per_chip"]
        slope = (size - smaller) / (best - before)
        left = fits[best]["chip_memory_bytes"] - size
        likely = best + int(left / slope) if slope > left / (MAX_GROWTH * best) else MAX_GROWTH * best
    if too_much is None:
        return max(best + 1, likely)
    return likely if best < likely < too_much else (best + too_much) // 2


def search_kinds(kinds: list[str], measure: Callable[[str, int], Report | None]) -> list[tuple[str, int, Report]]:
    """(kind, n, report) of the largest n of each kind that fits at all, the most tokens a second first; `kinds` are in
    the order in which they need less memory, or so it is hoped."""
    found, first = [], 1
    for kind in kinds:
        most = find_largest(lambda n, kind=kind: measure(kind, n), first)
        if most is not None:
            found.append((kind, *most))
            first = most[0]
    return sorted(found, key=lambda one: -one[2]["tokens_per_s_per_chip"])
