"""The figures of a plan follow from counts by arithmetic that can be done by hand."""

from collections import Counter

import pytest

from jaxtml import config as configs
from jaxtml.model.flops import forward_flops_per_token
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.micro_turn import MicroTurnProgram, Turn
from jaxtml.plan.mix import Mix
from jaxtml.plan.report import ServingLoad, report_serving, report_training
from jaxtml.plan.roofline import Memory, collective_latency, compute_roofline
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
    ("topology", "mesh", "bound", "seconds"),
    [
        ("h100:2x8", MeshShape(data=2, expert=8), "links", 1e12 / 450e9),
        ("h100:2x8", MeshShape(expert=2, data=8), "links", 1e12 / 450e9),
        # Of 2e12 bytes, half come from the other host, and each of its eight GPUs sends an eighth of them.
        ("h100:2x8", MeshShape(expert=16), "links", 1e12 / 450e9),
        # Here no two GPUs of a host take part: every byte crosses.
        ("h100:2x8", MeshShape(expert=2, tensor=8), "network", 1e12 / 50e9),
        ("gb200:18x4", MeshShape(expert=72), "links", 1e12 / 900e9),
        ("2xv5p:2x2x1", MeshShape(expert=2, tensor=4), "network", 1e12 / 6.25e9),
    ],
    ids=str,
)
def test_a_collective_beyond_the_chips_with_fast_links_goes_over_the_network(topology, mesh, bound, seconds):
    sent = Counter({("all_gather", ("expert",)): 1e12})
    found = compute_roofline(Work(1.0, sent), 0, Topology.parse(topology), mesh)  # pyright: ignore[reportArgumentType]
    assert found.bound == bound
    assert found.step == pytest.approx(seconds)


def test_what_crosses_the_network_is_shared_by_the_chips_of_a_slice():
    sent = Counter({("all_gather", ("data",)): 1e12, ("all_to_all", ("data",)): 1e9})
    found = compute_roofline(Work(1.0, sent), 0, Topology.parse("2xv5p:2x2x1"), MeshShape(data=8))  # pyright: ignore[reportArgumentType]
    # A device sends 7/8 of a collective's bytes. Half of them cross; of an all_gather, four devices share that half.
    assert found.network == pytest.approx(8 / 7 / 2 * (1e12 / 4 + 1e9) / 6.25e9)


def test_a_collective_waits_for_its_launch_and_its_hops():
    mesh, v6e = MeshShape(expert=8, tensor=4), Topology.parse("v6e:4x8")
    us = {
        (kind, axes): 1e6 * collective_latency(kind, axes, v6e, mesh)
        for kind in ("all_gather", "all_reduce")
        for axes in (("tensor",), ("expert", "tensor"))
    }
    assert us == pytest.approx({
        ("all_gather", ("tensor",)): 4.7 + 3, ("all_gather", ("expert", "tensor")): 4.7 + 10,
        ("all_reduce", ("tensor",)): 4.7 + 6, ("all_reduce", ("expert", "tensor")): 4.7 + 20,
    })  # fmt: skip
    calls = Counter({("all_gather", ("tensor",)): 3, ("all_reduce", ("expert", "tensor")): 2})
    found = compute_roofline(Work(calls=calls), 0, v6e, mesh)
    assert found.latency == pytest.approx((3 * 7.7 + 2 * 24.7) * 1e-6)
    assert found.step == 0
    gpu = Topology.parse("8xh100")
    assert collective_latency("all_reduce", ("tensor",), gpu, MeshShape(tensor=8)) == pytest.approx(22.5e-6)


MIX = Mix("a mix", {Turn(False, 0, False): 0.99, Turn(True, 50, True): 0.01}, 0.0)


def part(positions: int, read: float, flops: float = 0.0, sent: float = 0.0, calls: int = 0, passes: int = 1) -> Work:
    """Returns the work of a part of a micro-turn."""
    key = ("all_gather", ("expert",))
    made = Work(flops, Counter({key: sent}), Counter({key: calls}), read=read)  # pyright: ignore[reportArgumentType]
    made.passes[4, positions] = passes
    return made


def test_a_micro_turn_takes_what_its_passes_read_multiply_and_send():
    """Computes the figures by hand: 32 sessions on 8 devices in two groups (`data`), with 6 of 256 experts per token.

    All other inputs are round numbers.
    """
    config = configs.load("tml_interaction_small")
    b, chips = config.backbone, Topology.parse("v5p:2x2x2")
    program = MicroTurnProgram(
        narrow=part(6, 4e9, flops=459e9, calls=100),
        wide=part(191, 4e9, flops=4590e9, calls=100),
        writing=part(5, 4.5e9, calls=90),
        speech=part(5, 5e9, sent=60e9, calls=80),
    )
    served = ServingLoad(
        sessions=32, session_shards=8, experts=10e9, weights=6e9, state=4e9, program=program, max_written=10
    )
    memory = Memory(arguments=int(20e9), outputs=int(4e9), aliased=int(4e9), temporaries=int(4e9))
    report = report_serving(config, served, memory, chips, MeshShape(data=2, expert=4), MIX)

    def reading(read: float, positions: int) -> float:
        return read + 10e9 * (1 - (1 - 6 / 256) ** (32 / 2 * positions))

    narrow, wide, writing, speech = reading(4e9, 6), reading(4e9, 191), reading(4.5e9, 5), reading(5e9, 5)
    floors = {"listening": narrow, "speaking": narrow + writing + speech, "longest": wide + 10 * writing + speech}
    for name, size in floors.items():
        assert report["weight_floor_ms"][name] == pytest.approx(1e3 * size / 2765e9)
    # Memory bounds the narrow prefill and a round, matrix products bound the wide prefill, links bound speech.
    listening, a_round = ((size + 4e9) / 2765e9 for size in (narrow, writing))
    roofs = {"listening": listening, "speaking": listening + a_round + 0.1, "longest": 0.01 + 10 * a_round + 0.1}
    assert report["turn_ms"] == pytest.approx({name: 1e3 * roof for name, roof in roofs.items()})
    assert report["turn_passes"] == {"listening": 1, "speaking": 3, "longest": 12}
    assert report["turn_collectives"] == {"listening": 100, "speaking": 270, "longest": 1080}
    latency = {name: 4.0 + 3 for name in roofs}  # us: of a collective, over `expert`
    for name, us in latency.items():
        added = report["turn_with_latency_ms"][name] - report["turn_ms"][name]
        assert added == pytest.approx(1e-3 * us * report["turn_collectives"][name])
    # In 27 % of the batches, one of 32 sessions does what one session does in 1 % of its micro-turns.
    assert report["mix_ms"] == pytest.approx({
        "p50": report["turn_with_latency_ms"]["listening"], "p95": report["turn_with_latency_ms"]["longest"],
        "longest": report["turn_with_latency_ms"]["longest"],
    })  # fmt: skip
    assert report["real_time"]
    unembed = 2 * b.d_model * b.vocab_size
    needed = 32 * (14 * (forward_flops_per_token(config, 2**24) - unembed) + 4 * unembed)
    assert report["flops_ratio"] == pytest.approx(459e9 * 8 / needed)
    assert report["tokens_per_s_per_chip"] == pytest.approx(32 * 14 / roofs["speaking"] / 8)
    assert report["memory"]["sessions"] == 4e9 and sum(report["memory"].values()) == memory.total


def test_sessions_at_200_ms_fit_into_memory_and_time_and_divide_by_the_shards():
    config = configs.load("tml_interaction_small", ["backbone.experts_per_token=256"])
    memory = Memory(arguments=int(23e9), outputs=int(8e9), aliased=int(8e9), temporaries=int(4e9))
    one = part(5, 5e9)
    program = MicroTurnProgram(one, one, one, one)

    def most(state: float) -> int:
        served = ServingLoad(16, 4, experts=10e9, weights=5e9, state=state, program=program, max_written=7)
        report = report_serving(config, served, memory, Topology.parse("v5p:2x2x1"), MeshShape(expert=4), MIX)
        return report["sessions_at_200_ms"]

    # With 0.75 GB per session, 116 sessions fit. Nine passes over 15 GB and the state take 200 ms with 92 sessions.
    assert most(8e9) == 92
    assert most(1e9) == 116  # with less state to read, memory is the limit
