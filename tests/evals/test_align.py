"""Words are aligned with the fewest errors, and only where they may be."""

import pytest

from jaxtml.evals.align import Pair, align, word_errors


@pytest.mark.parametrize(
    ("true", "given", "errors"),
    [
        ("three nine one", "three nine one", 0),
        ("three nine one", "three five one", 1),
        ("three nine one", "three one", 1),
        ("three nine one", "three nine nine one", 1),
        ("three nine one", "", 3),
        ("", "i see", 2),
        ("alpha bravo charlie", "bravo charlie delta", 2),
    ],
)
def test_errors_are_wrong_missing_and_added_words(true, given, errors):
    assert word_errors(true.split(), given.split()) == errors


def test_every_word_of_both_sides_stands_in_one_pair_in_order():
    pairs = align(["a", "b", "c", "d"], ["b", "x", "d", "e"])
    assert [p.true for p in pairs if p.true is not None] == [0, 1, 2, 3]
    assert [p.given for p in pairs if p.given is not None] == [0, 1, 2, 3]
    assert Pair(1, 0) in pairs and Pair(3, 2) in pairs


def test_words_that_may_not_match_are_one_missing_and_one_added():
    pairs = align(["two"], ["two"], lambda i, j: False)
    assert sorted(pairs, key=str) == sorted([Pair(0, None), Pair(None, 0)], key=str)
