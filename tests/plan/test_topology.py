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
    ("text", "meant"),
    [("v5p-8", "v5p:2x2x1"), ("v5p-256", "v5p:4x4x8"), ("v5p-1536", "v5p:8x8x12"), ("tpu7x-256", "tpu7x:4x4x8"),
     ("v6e-1", "v6e:1x1"), ("v6e-16", "v6e:4x4"), ("v5litepod-16", "v5e:4x4"), ("v5e-256", "v5e:16x16"),
     ("v7x:8x4x4", "tpu7x:4x4x8"), ("V5P-256", "v5p:4x4x8"), (" v5p:8x4x4 ", "v5p:4x4x8"), ("v6e:16x8", "v6e:8x16"),
     ("v5p-4x4x8", "v5p:4x4x8"), ("tpu-v6e:4x4", "v6e:4x4"), ("1xv5p-256", "v5p:4x4x8"), ("2xv5p-256", "2xv5p:4x4x8"),
     ("h200", "h200:1x1"), ("8xh200", "h200:1x8"), ("16xH200", "h200:2x8"), ("h100-8", "h100:1x8"),
     ("72xgb200", "gb200:18x4")],
)  # fmt: skip
def test_a_name_that_people_use_is_read(text, meant):
    assert str(Topology.parse(text)) == meant and Topology.parse(meant) == Topology.parse(text)


def test_slices_add_up_and_a_network_connects_them():
    one, two = Topology.parse("tpu7x:4x4x8"), Topology.parse("2xtpu7x:4x4x8")
    assert (two.chips, two.devices, two.domain) == (256, 512, 256) and one.domain is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4:4x4x4", "no chip 'v4'; there are v5e, v5p, v6e, tpu7x, h100, h200, gb200, for example"),
        ("", "no chip ''; there are"),
        (
            "v5p-250",
            "this name counts TensorCores, two for each chip, and v5p comes as v5p-128, v5p-256,",
        ),
        ("v6e-12", "this name counts chips, and v6e comes as v6e-4, v6e-8, v6e-16"),
        ("0xv5p:4x4x8", "no chip '0xv5p:4x4x8'"),
        ("2000xv5p:4x4x8", "give at most 1024 slices"),
        ("12xh200", "a host has at most 8 GPUs, so give a multiple of 8"),
        ("2xh100:2x8", "write it as h100:2x8, two hosts with 8 GPUs each, or as 16xh100"),
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
