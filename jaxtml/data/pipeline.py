"""Training batches as a pure function of the step, made in worker processes.

Row `r` of step `s` is row `s * batch + r` of the dataset. A run therefore resumes from one integer, with any number of
workers and of hosts. Called by `jaxtml.train.feed`.

Axis glossary: B rows of a batch; the other axes are those of `jaxtml.data.rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from jaxtml.data.dataset import Dataset

Batch = dict[str, np.ndarray]
"""The arrays of `jaxtml.data.rows.Row` with a batch axis in front, `[B, ...]`."""

_ENDLESS = 1 << 40  # rows; more than any run reads


@dataclass(frozen=True)
class HostRows:
    """The rows of the global batch that one host makes: those of its own devices.

    Attributes:
      positions: positions in the global batch, in order; None for all of them. The positions need not be
        consecutive: where the devices form a torus, the order of the mesh may interleave hosts.
    """

    positions: tuple[int, ...] | None = None

    def count(self, batch: int) -> int:
        """Returns how many rows of a global batch of `batch` rows this host makes."""
        return batch if self.positions is None else len(self.positions)

    def dataset_index(self, local_index: int, batch: int) -> int:
        """Returns the dataset index of this host's row `local_index`, counted over all steps."""
        step, within = divmod(local_index, self.count(batch))
        return step * batch + (within if self.positions is None else self.positions[within])


def batches(
    dataset: Dataset, batch: int, *, start: int = 0, workers: int = 0, host_rows: HostRows = HostRows()
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over the batches from step `start` on.

    A step always has the same batch, whatever `start` and `workers` are.

    Args:
      dataset: makes the rows.
      batch: rows of the global batch.
      start: the first step. A resumed run needs no other state of the data.
      workers: processes that make batches in advance; 0 makes them in this process. `close()` the iterator to end the
        processes.
      host_rows: the rows of the global batch that this host makes; they are the B rows of each result.
    """
    rows_per_step = host_rows.count(batch)
    # Rows are batched before Grain deals them to workers. Workers take whole steps in turn, so the order of the steps
    # is that of a single process.
    steps = (
        grain.MapDataset.range(start * rows_per_step, _ENDLESS)
        .map(lambda local_index: dataset.row(host_rows.dataset_index(int(local_index), batch)))
        .batch(rows_per_step)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; a program that parses none uses their defaults.
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        steps = steps.mp_prefetch(options)
    return iter(steps)
