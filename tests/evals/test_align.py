"""Words are aligned with the fewest errors, and only where they may match."""

import pytest

from jaxtml.evals.align import AlignedPair, align, word_errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
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
def test_errors_are_substituted_deleted_and_inserted_words(reference, hypothesis, errors):
    assert word_errors(reference.split(), hypothesis.split()) == errors


def test_every_word_of_both_sequences_is_in_one_pair_in_order():
    pairs = align(["a", "b", "c", "d"], ["b", "x", "d", "e"])
    assert [p.reference for p in pairs if p.reference is not None] == [0, 1, 2, 3]
    assert [p.hypothesis for p in pairs if p.hypothesis is not None] == [0, 1, 2, 3]
    assert AlignedPair(1, 0) in pairs and AlignedPair(3, 2) in pairs


def test_words_that_may_not_match_are_one_deleted_and_one_inserted():
    pairs = align(["two"], ["two"], lambda i, j: False)
    assert sorted(pairs, key=str) == sorted([AlignedPair(0, None), AlignedPair(None, 0)], key=str)
