"""A plan's figures follow from counts by arithmetic that can be done by hand."""

from collections import Counter

import pytest

from jaxtml.parallel.work import Work
from jaxtml.plan.report import Memory, times, train_report
from jaxtml.plan.topology import Topology

V5P = Topology.parse("v5p:4x4x8")
MEMORY = Memory(arguments=12 * 10**9, outputs=10 * 10**9, aliased=10 * 10**9, temporaries=20 * 10**9, code=10**6)


def work(flops: float = 459e12, inside: float = 0.0, crossing: float = 0.0) -> Work:
    sent = Counter({("all_gather", ("data",)): inside, ("all_reduce", ("replica",)): crossing})
    return Work(flops, sent)  # pyright: ignore[reportArgumentType]


def test_memory_counts_what_is_overwritten_once():
    assert MEMORY.total == 32 * 10**9 + 10**6


@pytest.mark.parametrize(
    ("given", "bound", "seconds"),
    [
        (work(), "compute", 1.0),
        (work(inside=1200e9), "links", 2.0),
        (work(crossing=25e9), "network", 4.0),
        (work(flops=1.0), "memory", 22e9 / 2765e9),
    ],
)
def test_the_slowest_part_is_the_time_of_a_step(given, bound, seconds):
    found = times(given, MEMORY.arguments + MEMORY.outputs, V5P)
    assert found.bound == bound
    assert found.step == pytest.approx(seconds)


def test_a_report_counts_per_chip_also_where_a_chip_is_two_devices():
    ironwood = Topology.parse("tpu7x:4x4x4")
    report = train_report(work(flops=2307e12 / 2), MEMORY, ironwood, tokens=64 * 1000, needed_flops=64 * 2307e12 * 0.75)
    assert report["chips"] == 64
    assert report["bytes_per_chip"] == 2 * MEMORY.total < report["chip_memory_bytes"]
    assert report["roofline_step_ms"] == pytest.approx(1000)
    assert report["tokens_per_s_per_chip"] == pytest.approx(1000)
    assert report["flops_ratio"] == pytest.approx(1 / 0.75)
    assert report["mfu"] == pytest.approx(0.75)
