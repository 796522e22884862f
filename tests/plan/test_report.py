"""The figures of a plan follow from counts by arithmetic that can be done by hand."""

from collections import Counter

import pytest

from jaxtml import config as configs
from jaxtml.model.flops import forward_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.report import WRITTEN_TOKENS, ServingLoad, report_serving, report_training
from jaxtml.plan.roofline import Memory, compute_roofline
from jaxtml.plan.topology import Topology

V5P = Topology.parse("v5p:4x4x8")
MESH = MeshShape(data=16, expert=8)
MEMORY = Memory(arguments=12 * 10**9, outputs=10 * 10**9, aliased=10 * 10**9, temporaries=20 * 10**9, code=10**6)


def work(flops: float = 459e12, sent: float = 0.0) -> Work:
    return Work(flops, Counter({("all_gather", ("data",)): sent}))  # pyright: ignore[reportArgumentType]


def test_overwritten_memory_counts_once():
    assert MEMORY.total == 32 * 10**9 + 10**6


@pytest.mark.parametrize(
    ("work_done", "bound", "seconds"),
    [
        (work(), "compute", 1.0),
        (work(sent=1200e9), "links", 2.0),
        (work(flops=1.0), "memory", 22e9 / 2765e9),
    ],
)
def test_the_slowest_part_is_the_time_of_a_step(work_done, bound, seconds):
    found = compute_roofline(work_done, MEMORY.arguments + MEMORY.outputs, V5P, MESH)
    assert found.bound == bound
    assert found.step == pytest.approx(seconds)


def test_a_report_counts_per_chip_also_where_a_chip_is_two_devices():
    ironwood = Topology.parse("tpu7x:4x4x4")
    needed = 64 * 2307e12 * 0.75
    argument_bytes = {"parameters": 4 * 10**9, "moments": 8 * 10**9}
    report = report_training(work(flops=2307e12 / 2), MEMORY, argument_bytes, ironwood, MESH, 64 * 1000, needed)
    assert report["memory"] == {"parameters": 8e9, "moments": 16e9, "temporaries": 40e9, "other": 2e6}
    assert report["chips"] == 64
    assert report["bytes_per_chip"] == 2 * MEMORY.total < report["chip_memory_bytes"]
    assert report["roofline_step_ms"] == pytest.approx(1000)
    assert report["tokens_per_s_per_chip"] == pytest.approx(1000)
    assert report["flops_ratio"] == pytest.approx(1 / 0.75)
    assert report["mfu"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("topology", "mesh", "rate"),
    [
        ("h100:2x8", MeshShape(data=2, expert=8), 450e9),
        ("h100:2x8", MeshShape(expert=16), 50e9),
        ("h100:2x8", MeshShape(expert=2, data=8), 450e9),
        ("gb200:18x4", MeshShape(expert=72), 900e9),
        ("gb200:36x4", MeshShape(expert=144), 50e9),
    ],
    ids=str,
)
def test_a_collective_beyond_the_gpus_with_fast_links_goes_over_the_network(topology, mesh, rate):
    sent = Counter({("all_gather", ("expert",)): 1e12})
    found = compute_roofline(Work(1.0, sent), 0, Topology.parse(topology), mesh)  # pyright: ignore[reportArgumentType]
    assert found.bound == ("network" if rate == 50e9 else "links")
    assert found.step == pytest.approx(1e12 / rate)


def test_a_micro_turn_takes_what_its_passes_read_multiply_and_send():
    """Computes the figures by hand: 32 sessions on 8 devices in two groups (`data`), with 6 of 256 experts per token.

    All other inputs are round numbers.
    """
    config = configs.load("tml_interaction_small")
    b, chips = config.backbone, Topology.parse("v5p:2x2x2")
    served = ServingLoad(
        sessions=32, session_shards=8, experts=10e9, weights=5e9, state=4e9, rare=1e9, flow=0.5e9,
        listening=work(459e9), fullest=work(4590e9), one_round=work(0.0, sent=60e9), prefill=(6, 191), max_rounds=20,
    )  # fmt: skip
    memory = Memory(arguments=int(20e9), outputs=int(4e9), aliased=int(4e9), temporaries=int(4e9))
    report = report_serving(config, served, memory, chips, MeshShape(data=2, expert=4))

    def reading(tokens: int, speaks: bool) -> float:
        touched = 1 - (1 - 6 / 256) ** (tokens / 2)
        return 5e9 - 1e9 - (0 if speaks else 0.5e9) + 10e9 * touched

    first, wide = reading(32 * 6, False), reading(32 * 191, False)
    written, spoken = reading(32, False), reading(32, True)
    floors = {"listening": first, "speaking": first + (1 + WRITTEN_TOKENS) * written + 4 * spoken,
              "longest": wide + 16 * written + 4 * spoken}  # fmt: skip
    for name, size in floors.items():
        assert report["weight_floor_ms"][name] == pytest.approx(1e3 * size / 2765e9)
    # Memory bounds a listening micro-turn, matrix products bound the longest input, links bound a round of the loop.
    listening = (first + 4e9) / 2765e9
    assert report["turn_ms"]["listening"] == pytest.approx(1e3 * listening)
    assert report["turn_ms"]["speaking"] == pytest.approx(1e3 * (listening + 8 * 0.1))
    assert report["turn_ms"]["longest"] == pytest.approx(1e3 * (0.01 + 20 * 0.1))
    unembed = 2 * b.d_model * b.vocab_size
    needed = 32 * (14 * (forward_flops_per_token(config, 2**24) - unembed) + 4 * unembed)
    assert report["flops_ratio"] == pytest.approx(459e9 * 8 / needed)
    assert report["tokens_per_s_per_chip"] == pytest.approx(32 * 14 / (listening + 0.8) / 8)
    assert report["memory"]["sessions"] == 4e9 and sum(report["memory"].values()) == memory.total


def test_sessions_at_200_ms_fit_into_memory_and_time_and_divide_by_the_shards():
    config = configs.load("tml_interaction_small", ["backbone.experts_per_token=256"])
    work_done = {"experts": 10e9, "weights": 5e9, "rare": 0.0, "flow": 0.0, "prefill": (6, 191), "max_rounds": 20}
    free = work(0.0)
    memory = Memory(arguments=int(23e9), outputs=int(8e9), aliased=int(8e9), temporaries=int(4e9))

    def most(state: float) -> int:
        served = ServingLoad(16, 4, **work_done, state=state, listening=free, fullest=free, one_round=free)
        report = report_serving(config, served, memory, Topology.parse("v5p:2x2x1"), MeshShape(expert=4))
        return report["sessions_at_200_ms"]

    # With 0.75 GB per session, 116 sessions fit. Nine passes over 15 GB and the state take 200 ms with 92 sessions.
    assert most(8e9) == 92
    assert most(1e9) == 116  # with less state to read, memory is the limit
