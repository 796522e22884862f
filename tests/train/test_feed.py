"""The feed counts the time for which the devices wait for a batch, and no other time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from jaxtml.parallel.mesh import MeshShape
from jaxtml.train import feed


class Step:
    """Stands in for a result of the last step. `is_over`: the step has ended when the batch is there."""

    def __init__(self, is_over: bool):
        self.is_ready = lambda: is_over


@pytest.fixture
def slow_feed(monkeypatch) -> feed.BatchFeed:
    """A feed whose batches take 20 ms each."""

    def slow(*args: Any, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        while True:
            time.sleep(0.02)
            yield {"ids": np.zeros(2)}

    monkeypatch.setattr(feed, "batches", slow)
    return feed.BatchFeed(cast("Any", None), 2, MeshShape(), first_step=0, workers=0)


@pytest.mark.parametrize(("running", "waits"), [(None, True), (Step(True), True), (Step(False), False)])
def test_the_time_counts_unless_a_step_is_running(slow_feed, running, waits):
    assert slow_feed.next_batch(running)["ids"].shape == (2,)
    waited_s = slow_feed.take_waited_s()
    assert 0.02 <= waited_s < 0.5 if waits else waited_s == 0
    assert slow_feed.take_waited_s() == 0
