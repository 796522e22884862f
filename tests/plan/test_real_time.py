"""A server that is too slow is refused with the changes that would do. The tests say how many bytes a device reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from jaxtml import config as configs
from jaxtml.config import Config
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.work import Work
from jaxtml.plan.micro_turn import MicroTurnProgram
from jaxtml.plan.real_time import TooSlow, check_real_time
from jaxtml.plan.report import ServingLoad
from jaxtml.plan.topology import Topology

V6E = Topology.parse("v6e:2x2")
MESH = MeshShape(expert=4)


def refusal(pass_bytes: Callable[[Config, MeshShape], tuple[float, float]]) -> str:
    """Returns the message for a server of `tiny` on `MESH`.

    `pass_bytes` returns the bytes that each device reads in the wide prefill, and in every other pass.
    """

    def measure(config: Config, _: Topology, mesh: MeshShape) -> ServingLoad:
        wide, other = (Work(read=size) for size in pass_bytes(config, mesh))
        wide.passes[1, 1] = other.passes[1, 1] = 1
        parts = dict.fromkeys((field.name for field in dataclasses.fields(MicroTurnProgram)), other)
        program = MicroTurnProgram(**parts | {"wide": wide, "speech": Work()})
        return ServingLoad(8, 4, experts=0, weights=0, state=0, program=program, max_written=17)

    with pytest.raises(TooSlow) as refused:
        check_real_time(configs.load("tiny"), V6E, MESH, measure, lambda _, place: MeshShape(2, place.devices // 2))
    message = str(refused.value)
    assert "\n" not in message and message.startswith("tiny is not served in real time on v6e:2x2: its longest")
    return message


def test_a_faster_mesh_is_named_before_more_chips():
    message = refusal(lambda _, mesh: (2e10, 2e10) if mesh == MESH else (1e9, 1e9))
    assert re.search(r"--mesh replica=2,data=2 \(\d\d ms\)", message) and "v6e:2x4" not in message


def test_the_smallest_larger_topology_is_named():
    message = refusal(lambda _, mesh: (4e11 / mesh.devices**2,) * 2)
    assert re.search(r"v6e:2x4 \(\d\d ms\)", message) and "v6e:4x4" not in message and "--mesh" not in message


def test_inputs_are_shortened_only_as_far_as_text_still_fits():
    limits = []

    def slow_prefill(config: Config, _: MeshShape) -> tuple[float, float]:
        limits.append(config.duplex.max_typed)
        return 1e12, 1e9

    assert refusal(slow_prefill).endswith("no single change of the config or the topology would do")
    assert set(limits) == {8, 4, 2}  # the limit counts the control token before the text
