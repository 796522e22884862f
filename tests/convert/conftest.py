"""A model that both layouts can hold, in files of a few kilobytes."""

from __future__ import annotations

import dataclasses

import pytest

from jaxtml.checkpoint import chunks
from jaxtml.checkpoint.orbax import sink
from jaxtml.config import Config


@pytest.fixture(scope="session")
def config(small) -> Config:
    """Inkling knows one number for window and relative extent of sliding layers."""
    sliding = dataclasses.replace(small.backbone.sliding, rel_extent=small.backbone.sliding.window)
    backbone = dataclasses.replace(small.backbone, sliding=sliding, mtp_heads=2, mtp_global=(1,))
    return dataclasses.replace(small, backbone=backbone)


@pytest.fixture
def many_chunks(monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(sink, "PIECE_BYTES", 512)
