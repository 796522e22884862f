"""`jaxtml plan --search`: finds the largest batch of each remat, or the largest number of sessions, that fits.

Called by `planning`; knows no compiler. A variant is a value of `train.remat`; serving has only one variant. A size is
a multiple of the smallest batch. Memory grows nearly in proportion to the size, so the next guess is extrapolated from
the two largest sizes that fit. Padding may give small batches equal memory; the extrapolation would then go too far, so
`MAX_GROWTH` bounds it. As soon as one size does not fit, the limit is narrowed down between that size and the largest
size that is known to fit.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtml.plan.report import Report

MAX_TRIES = 10  # compilations of one variant
MAX_GROWTH = 8  # a guess adds at most this many times the largest size that is known to fit


def find_largest(measure: Callable[[int], Report | None], first: int = 1) -> tuple[int, Report] | None:
    """Finds the largest n that fits, as far as `MAX_TRIES` tries can tell.

    Args:
      measure: compiles the program for the size n, which is n times the smallest batch. Returns a report with
        `bytes_per_chip` and `chip_memory_bytes`, or None if the program does not fit.
      first: the n to begin with.

    Returns:
      The n and its report; None where nothing fits.
    """
    fitting: dict[int, Report] = {}
    too_large, guess = None, first
    for _ in range(MAX_TRIES):
        report = measure(guess)
        if report is None:
            too_large = guess
        else:
            fitting[guess] = report
        best = max(fitting, default=0)
        if too_large is not None and too_large - best <= 1:
            break
        guess = _next_guess(fitting, best, too_large)
    return (best, fitting[best]) if fitting else None


def _next_guess(fitting: dict[int, Report], best: int, too_large: int | None) -> int:
    """Returns the size to try next, extrapolated from the two largest sizes that fit.

    The size is larger than `best`, and smaller than `too_large` where a size is known that does not fit.
    """
    likely = 2 * best
    if len(fitting) > 1:
        second = sorted(fitting)[-2]
        best_bytes, second_bytes = fitting[best]["bytes_per_chip"], fitting[second]["bytes_per_chip"]
        slope = (best_bytes - second_bytes) / (best - second)
        room = fitting[best]["chip_memory_bytes"] - best_bytes
        likely = best + int(room / slope) if slope > room / (MAX_GROWTH * best) else MAX_GROWTH * best
    if too_large is None:
        return max(best + 1, likely)
    return likely if best < likely < too_large else (best + too_large) // 2


def search_variants(variants: list[str], measure: Callable[[str, int], Report | None]) -> list[tuple[str, int, Report]]:
    """Finds the largest n of each variant.

    Args:
      variants: in the order of falling memory, as far as that is known.
      measure: as in `find_largest`, with the variant first.

    Returns:
      (variant, n, report) for each variant that fits at all, in the order of falling tokens per second.
    """
    results, first = [], 1
    for variant in variants:
        largest = find_largest(lambda n, variant=variant: measure(variant, n), first)
        if largest is not None:
            results.append((variant, *largest))
            first = largest[0]
    return sorted(results, key=lambda result: -result[2]["tokens_per_s_per_chip"])
