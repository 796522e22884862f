"""The batches of a run, on the devices of the mesh. Each process makes the rows of its own devices.

A batch depends on the dataset, the batch size and the step alone. On a mesh its rows are split over `BATCH_AXES`; the
devices of one `tensor` group hold the same rows. Called by `jaxtml.train.loop`. With more than one device, the loop
sets the mesh first (`jax.set_mesh`).

Axes: R rows of the global batch, r rows of this process; the other axes are those of `jaxtml.data.rows`.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtml.data.dataset import Dataset
from jaxtml.data.pipeline import Batch, HostRows, batches
from jaxtml.parallel.mesh import BATCH_AXES, MeshShape

Index = tuple[slice, ...]


class BatchFeed:
    """An endless iterator over the batches of a run, from a first step on.

    Attributes:
      waited_s: seconds for which the devices had nothing to do, because the next batch was not there; counted by
        `next_batch` since the start or the last `take_waited_s`.
    """

    def __init__(self, dataset: Dataset, batch: int, mesh: MeshShape, *, first_step: int, workers: int):
        """Opens the feed.

        Args:
          dataset: makes the rows.
          batch: rows of the global batch.
          mesh: the shape of the mesh that `jax.set_mesh` has set. With one device, batches stay NumPy arrays.
          first_step: number of the first batch.
          workers: processes that make batches in advance; 0 makes them in this process.
        """
        self.batch = batch
        self.sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(BATCH_AXES)) if mesh.devices > 1 else None
        self.host_rows = self._host_rows()
        self.waited_s = 0.0
        self.batches = batches(dataset, batch, start=first_step, workers=workers, host_rows=self.host_rows)

    def __next__(self) -> dict[str, Any]:
        """Returns the next batch: `[R, ...]` each, as global arrays on a mesh, else as NumPy arrays."""
        local = next(self.batches)
        return {name: self._global_array(rows) for name, rows in local.items()} if self.sharding else local

    def next_batch(self, running: jax.Array | None) -> dict[str, Any]:
        """Returns the next batch, and counts the time for which the devices wait for it.

        Args:
          running: a result of the step that was started last; None: no step is running. The step runs on while the
            host asks for the next batch. So the time counts only if the step has ended when the batch is there.
        """
        asked_s = time.monotonic()
        batch = next(self)
        if running is None or running.is_ready():  # pyright: ignore[reportAttributeAccessIssue] (not in its stub)
            self.waited_s += time.monotonic() - asked_s
        return batch

    def take_waited_s(self) -> float:
        """Returns `waited_s` and sets it to 0."""
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """Ends the worker processes."""
        self.batches.close()

    def _host_rows(self) -> HostRows:
        """Returns the rows of the global batch that the devices of this process hold."""
        if self.sharding is None:
            return HostRows()
        indices: Any = self.sharding.addressable_devices_indices_map((self.batch,))
        rows = {row for index in indices.values() for row in range(self.batch)[index[0]]}
        return HostRows(tuple(sorted(rows)))

    def _global_array(self, rows: np.ndarray) -> jax.Array:
        """Returns the global array `[R, ...]` whose part on this process's devices is `rows` `[r, ...]`."""
        assert self.sharding is not None
        positions = self.host_rows.positions or range(self.batch)
        position = {row: i for i, row in enumerate(positions)}

        def device_part(index: Index | None) -> np.ndarray:
            assert index is not None
            wanted = range(self.batch)[index[0]]
            return rows[position[wanted[0]] : position[wanted[-1]] + 1]

        return jax.make_array_from_callback((self.batch, *rows.shape[1:]), self.sharding, device_part)


def read_batch(dataset: Dataset, batch: int, step: int) -> Batch:
    """Returns the whole global batch number `step` as NumPy arrays, made in this process."""
    feed = batches(dataset, batch, start=step)
    try:
        return next(feed)
    finally:
        feed.close()
