"""Chunks cover a parameter once, are not too large, and lie together in the released tensor."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from jaxtml import config as configs
from jaxtml.checkpoint import chunks
from jaxtml.checkpoint.chunks import chunk_indices, chunk_shape
from jaxtml.checkpoint.source import spec_table


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8192)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_cover_every_number_once(releasable):
    for path, spec in spec_table(releasable).items():
        times_covered = np.zeros(spec.shape, int)
        for index in chunk_indices(spec, chunk_shape(spec, 2)):
            times_covered[index] += 1
        assert (times_covered == 1).all(), path
        assert 2 * np.prod(chunk_shape(spec, 2)) <= chunks.CHUNK_BYTES


@pytest.mark.usefixtures("small_chunks")
def test_the_chunks_of_a_layer_follow_each_other_in_the_released_tensor(releasable):
    for path, spec in spec_table(releasable).items():
        if spec.released is not None:
            size = math.prod(spec.released.shape)
            # Each element of this tensor is its own offset in the file. `ours` is the tensor in our layout.
            ours = spec.released.load(np.arange(size).reshape(spec.released.shape))
            parts = [ours[index[spec.stacked :]] for index in chunk_indices(spec, chunk_shape(spec, 2))]
            parts = parts[: len(parts) // math.prod(spec.shape[: spec.stacked])]  # of the first layer
            written = np.concatenate([part.transpose(spec.released.order).ravel() for part in parts])
            np.testing.assert_array_equal(written, np.arange(size), err_msg=path)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("experts", [2039, 31])
def test_sizes_without_divisors_do_not_make_many_small_files(experts, small):
    """Neither 2039 nor 31 has a divisor to cut by. A chunk holds 8 or 16 of the 2039 small experts, or 1 of the 31."""
    width = 8 if experts > 1000 else 64
    backbone = dataclasses.replace(small.backbone, n_experts=experts, d_ff_expert=width)
    specs = spec_table(dataclasses.replace(small, backbone=backbone))
    for spec in (spec for path, spec in specs.items() if "expert" in spec.axes and path.startswith("layers")):
        shape = chunk_shape(spec, 2)
        layers, layer_bytes = math.prod(spec.shape[:2]), 2 * math.prod(spec.shape[2:])
        assert len(list(chunk_indices(spec, shape))) <= layers * (2 * layer_bytes // chunks.CHUNK_BYTES + 2), shape


def test_the_chunks_of_the_large_models_are_at_most_8_mib():
    for name in ("inkling_small", "tml_interaction_small"):
        for path, spec in spec_table(configs.load(name)).items():
            assert 2 * math.prod(chunk_shape(spec, 2)) <= 2**23, path
