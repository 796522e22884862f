"""The search finds the largest size that fits, with few compilations."""

from __future__ import annotations

import pytest

from jaxtml.plan.search import MAX_TRIES, find_largest, search_variants


def make_chip(fixed: float, each: float, growth: float = 0.0, limit: float = 100.0):
    """Returns a stand-in for a compiler, for a chip of `limit` bytes, and the list of sizes that it was asked for."""
    asked: list[int] = []

    def measure(n: int):
        asked.append(n)
        needs = fixed + n * each + growth * n * n
        fits = needs <= limit
        return {"bytes_per_chip": needs, "chip_memory_bytes": limit, "tokens_per_s_per_chip": n} if fits else None

    return measure, asked


@pytest.mark.parametrize(
    ("fixed", "each", "growth", "expected"),
    [
        (20, 10, 0, 8),
        (20, 7, 0, 11),
        (95, 10, 0, None),
        (85, 10, 0, 1),
        (80, 10, 0, 2),
        (10, 10, 0.2, 7),
        (10, 1, 0, 90),
    ],
)
def test_the_largest_batch_that_fits_is_found(fixed, each, growth, expected):
    measure, asked = make_chip(fixed, each, growth)
    found = find_largest(measure)
    assert (found and found[0]) == expected
    assert len(asked) <= MAX_TRIES
    assert len(set(asked)) == len(asked), "compiled twice"


@pytest.mark.parametrize(("block", "expected"), [(8, 80), (64, 64)])
def test_small_batches_that_are_padded_to_one_size_do_not_mislead(block, expected):
    asked = []

    def measure(n: int):
        asked.append(n)
        needs = 20 + -(-n // block) * block
        return {"bytes_per_chip": needs, "chip_memory_bytes": 100} if needs <= 100 else None

    found = find_largest(measure)
    assert found is not None and 0.95 * expected <= found[0] <= expected
    assert len(asked) <= MAX_TRIES and max(asked) < 10 * expected


def test_the_variant_with_the_most_tokens_comes_first_and_a_variant_that_never_fits_is_left_out():
    costs = {"none": 60.0, "outputs": 30.0, "full": 10.0}

    def measure(variant: str, n: int):
        if 50 + n * costs[variant] > 100:
            return None
        speed = {"none": 4.0, "outputs": 3.5, "full": 3.0}[variant] * n / (n + 1)
        return {"bytes_per_chip": 50 + n * costs[variant], "chip_memory_bytes": 100, "tokens_per_s_per_chip": speed}

    assert [(variant, n) for variant, n, _ in search_variants(["none", "outputs", "full"], measure)] == [
        ("full", 5),
        ("outputs", 1),
    ]
