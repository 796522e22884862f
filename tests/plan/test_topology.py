"""A topology is read as it is written; for one that does not exist, the error names topologies that do."""

import pytest

from jaxtml.errors import InputError
from jaxtml.plan.topology import Topology


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [("v5p:4x4x8", 128, 128), ("v6e:16x16", 256, 256), ("tpu7x:4x8x8", 256, 512), ("v5e:2x4", 8, 8),
     ("h100:8x8", 64, 64), ("gb200:18x4", 72, 72), ("v5p:2x2x2", 8, 8), ("v5p:8x8x12", 768, 768)],
)  # fmt: skip
def test_a_topology_counts_chips_and_devices(text, chips, devices):
    topology = Topology.parse(text)
    assert (topology.chips, topology.devices, str(topology)) == (chips, devices, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4:4x4x4", "no chip 'v4'; there are v5e, v5p, v6e, tpu7x, h100, gb200"),
        ("h100:16", "write it as h100:2x8, two hosts with 8 GPUs each"),
        ("h100:1x16", "write it as h100:2x8, two hosts with 8 GPUs each"),
        ("gb200:0x4", "write it as gb200:2x4, two hosts with 4 GPUs each"),
        ("v5p", "v5p comes as 2x2x1, "),
        ("v5p:4x4", "v5p comes as 2x2x4, "),
        ("v5p:4x4x9", "v5p comes as 4x4x8, 4x4x12"),
        ("v6e:16x32", "v6e comes as 16x16, "),
        ("v6e:0x0", "v6e comes as 1x1, "),
        ("v6e:axb", "v6e comes as 1x1, "),
    ],
)
def test_the_error_for_a_topology_that_does_not_exist_names_its_neighbours(text, message):
    with pytest.raises(InputError, match=message):
        Topology.parse(text)
