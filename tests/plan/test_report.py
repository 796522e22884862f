"""A plan's figures follow from counts by arithmetic that can be done by hand."""

from collections import Counter

import pytest

from jaxtml import config as configs
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.report import WRITTEN, Memory, Served, serve_report, times, train_report
from jaxtml.plan.topology import Topology

V5P = Topology.parse("v5p:4x4x8")
MESH = MeshShape(data=16, expert=8)
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
    found = times(given, MEMORY.arguments + MEMORY.outputs, V5P, MESH)
    assert found.bound == bound
    assert found.step == pytest.approx(seconds)


def test_a_report_counts_per_chip_also_where_a_chip_is_two_devices():
    ironwood = Topology.parse("tpu7x:4x4x4")
    needed = 64 * 2307e12 * 0.75
    report = train_report(work(flops=2307e12 / 2), MEMORY, ironwood, MESH, tokens=64 * 1000, needed_flops=needed)
    assert report["chips"] == 64
    assert report["bytes_per_chip"] == 2 * MEMORY.total < report["chip_memory_bytes"]
    assert report["roofline_step_ms"] == pytest.approx(1000)
    assert report["tokens_per_s_per_chip"] == pytest.approx(1000)
    assert report["flops_ratio"] == pytest.approx(1 / 0.75)
    assert report["mfu"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("mesh", "bound"),
    [(MeshShape(data=2, expert=8), "links"), (MeshShape(expert=16), "network"), (MeshShape(expert=2, data=8), "links")],
    ids=str,
)
def test_what_reaches_beyond_a_host_of_gpus_goes_over_the_network(mesh, bound):
    sent = Counter({("all_gather", ("expert",)): 1e12})
    found = times(Work(1.0, sent), 0, Topology.parse("h100:2x8"), mesh)  # pyright: ignore[reportArgumentType]
    assert found.bound == bound
    assert found.step == pytest.approx(1e12 / (450e9 if bound == "links" else 50e9))


def served(sessions: int) -> Served:
    """Sixteen sessions a chip, all experts of a device touched: a pass reads 10 GB of experts and 5 of the rest."""
    return Served(sessions, 10e9, 5e9, sessions * 0.5e9, work(0.0), work(0.0), longest=20)


def test_serving_reads_weights_and_memories_once_a_pass_and_counts_sessions_up():
    config = configs.load("tml_interaction_small", ["backbone.experts_per_token=256"])
    v5p = Topology.parse("v5p:2x2x1")
    memory = Memory(arguments=int(23e9), outputs=int(8e9), aliased=int(8e9), temporaries=int(4e9))
    report = serve_report(config, served(16), memory, v5p, MeshShape(expert=4))
    passes = {"listening": 1, "speaking": 1 + 5 + WRITTEN, "longest": 21}
    for name, count in passes.items():
        assert report["turn_ms"][name] == pytest.approx(count * 1e3 * 23e9 / 2765e9)
        assert report["weight_floor_ms"][name] == pytest.approx(count * 1e3 * 15e9 / 2765e9)
    assert report["memory"]["sessions"] == 8e9 and report["memory"]["temporaries"] == 4e9
    # 0.75 GB a session, temporaries in proportion: memory is full at 115, 200 ms are over before.
    most = report["sessions_at_200_ms"]
    assert 9 * (15e9 + most * 0.5e9) / 2765e9 <= 0.2 < 9 * (15e9 + (most + 1) * 0.5e9) / 2765e9
    assert sum(report["memory"].values()) == report["bytes_per_chip"] == memory.total
