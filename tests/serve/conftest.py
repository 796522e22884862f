"""Slots of the small model, compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.session.slots import Slots
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

TURNS = 14


@pytest.fixture(scope="session")
def compiled(engine) -> Slots:
    """Buckets of 1, 2 and 4."""
    return Slots(engine, 4, (1, 2))


@pytest.fixture(scope="session")
def checkpoint(small, params, codec, tmp_path_factory) -> Path:
    """The small model on disk."""
    folder = tmp_path_factory.mktemp("served")
    codec.save(folder / "tokenizer.json")
    save_checkpoint(folder / "ck", small, params, tokenizer_path=folder / "tokenizer.json")
    return folder / "ck"


@pytest.fixture
def slots(compiled) -> Iterator[Slots]:
    yield compiled
    for session in list(compiled.live):
        compiled.end(session)


@pytest.fixture(scope="session")
def wave() -> np.ndarray:
    return (0.1 * np.random.default_rng(4).standard_normal(TURNS * MICRO_TURN_SAMPLES)).astype(np.float32)
