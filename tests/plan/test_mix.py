"""A batch waits for its slowest session: the shares of its micro-turns follow from those of one session."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from jaxtml.errors import InputError
from jaxtml.plan.micro_turn import Course, Turn
from jaxtml.plan.mix import DEFAULT, Mix, batch_shares, parse_mix, quantile

SHARES = {
    Turn(False, 0, False): 0.5, Turn(False, 2, False): 0.2, Turn(False, 1, True): 0.2, Turn(True, 4, True): 0.1,
}  # fmt: skip


def course(turn: Turn) -> Course:
    return Course(turn.given, turn.written + 5 * turn.speaks, turn.speaks)


@pytest.mark.parametrize("sessions", [1, 2, 3])
def test_the_shares_of_a_batch_are_those_of_all_combinations(sessions):
    expected: dict[Course, float] = {}
    for turns in itertools.product(SHARES, repeat=sessions):
        slowest = Course(*(max(values) for values in zip(*map(course, turns), strict=True)))
        expected[slowest] = expected.get(slowest, 0) + math.prod(SHARES[turn] for turn in turns)
    found = batch_shares(Mix("", SHARES, 0), sessions, course)
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key]) for key in expected)


def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed():
    shares = {10.0: 0.5, 20.0: 0.44, 70.0: 0.06}
    assert [quantile(shares, share) for share in (0.3, 0.5, 0.51, 0.94, 0.95, 1)] == [10, 10, 20, 20, 70, 70]


def test_the_default_mix_is_measured_and_has_every_kind_of_micro_turn():
    mix = Mix.read(DEFAULT)
    assert sum(mix.shares.values()) == pytest.approx(1)
    assert {turn.speaks for turn in mix.shares} == {turn.given for turn in mix.shares} == {False, True}
    assert max(turn.written for turn in mix.shares) > 3
    assert "conversations" in json.loads(DEFAULT.read_text())["measured"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"confirmed": 0, "turns": []}',
        '{"confirmed": 0, "turns": [{"given": false, "written": 2}]}',
        '{"confirmed": 0, "turns": [{"given": false, "written": 2, "speaks": "no", "count": 1}]}',
        '{"confirmed": 0, "turns": [{"given": false, "written": -1, "speaks": true, "count": 1}]}',
        '{"confirmed": 0, "turns": [{"given": false, "written": 2, "speaks": true, "count": NaN}]}',
    ],
)
def test_a_file_that_is_no_mix_is_refused(content, tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"mix .*mix.json: it is not what tools/benchmarks/session_mix.py writes"):
        Mix.read(path)
    with pytest.raises(InputError, match="No such file"):
        Mix.read(tmp_path / "absent.json")


def test_equal_kinds_are_counted_together():
    entry = {"given": False, "written": 1, "speaks": True, "count": 1}
    assert parse_mix("", {"confirmed": 0.5, "turns": [entry, entry]}).shares == {Turn(False, 1, True): 1.0}
