"""The worker pool: the workers of a server, side by side. A session stays in one worker from its beginning to its end.

Called by `serve.serving`, which starts it, and by `serve.sessions.manager`, which admits sessions.

With a mesh there is one worker, which has all devices. On a CPU there is one worker per core, each pinned to its core:
the matrix products of a small model are too small for two cores to share. A worker splits its sessions into groups
(`jaxtml.session.slots.slot_groups`), and each group has a scheduler. Every 200 ms each scheduler asks its worker for a
tick: one step of the model. The schedulers do so one after another, at equal distances within the 200 ms. So neither a
worker nor the network process, which serves the clients, gets the requests of all schedulers at once.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from jaxtml.errors import InputError
from jaxtml.serve.runtime.scheduler import TICK_S, ScheduledSession, Scheduler, ServerFull
from jaxtml.serve.runtime.wire import WorkerReady
from jaxtml.serve.runtime.worker_process import WorkerProcess

OnTick = Callable[[float, float], None]  # as `Scheduler.on_tick`


class WorkerPool:
    """The schedulers of a server, and the workers that run the schedulers' ticks. `start_pool` creates a pool.

    Args:
      schedulers: one per group of sessions.
      workers: the worker processes. When one of them ends, `run` ends.
    """

    def __init__(self, schedulers: Sequence[Scheduler], workers: Sequence[WorkerProcess] = ()):
        self.schedulers, self.workers = tuple(schedulers), tuple(workers)

    @property
    def capacity(self) -> int:
        """The number of slots of all schedulers."""
        return sum(scheduler.capacity for scheduler in self.schedulers)

    @property
    def taken(self) -> int:
        """The number of slots that a new session cannot have."""
        return self.capacity - sum(scheduler.free_slots() for scheduler in self.schedulers)

    @property
    def sessions(self) -> list[ScheduledSession]:
        """The sessions of all schedulers."""
        return list(itertools.chain.from_iterable(scheduler.sessions.values() for scheduler in self.schedulers))

    def admit(self, seed: int, grace_s: float = 30.0) -> ScheduledSession:
        """Admits a session to the scheduler with the fewest sessions. The arguments are those of `Scheduler.admit`.

        Raises:
          ServerFull: no slot is free.
        """
        self.check_capacity()
        open_schedulers = filter(Scheduler.free_slots, self.schedulers)
        return min(open_schedulers, key=lambda scheduler: len(scheduler.sessions)).admit(seed, grace_s)

    def check_capacity(self) -> None:
        """Raises `ServerFull` if no slot is free. The error has the shortest waiting time of all schedulers."""
        if not any(scheduler.free_slots() for scheduler in self.schedulers):
            raise ServerFull(min(scheduler.retry_after_s() for scheduler in self.schedulers))

    async def run(self) -> None:
        """Runs all schedulers until the task is cancelled.

        Raises:
          ConnectionError: a worker is gone. All schedulers are then stopped.
        """
        offset_s = TICK_S / len(self.schedulers)
        tasks = [
            asyncio.create_task(_run_after(offset_s * index, scheduler))
            for index, scheduler in enumerate(self.schedulers)
        ]
        tasks += [asyncio.create_task(worker.wait_gone()) for worker in self.workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def start_pool(
    checkpoint: str | Path,
    capacity: int,
    workers: int,
    on_tick: OnTick = lambda tick_s, step_s: None,
    mesh: str = "",
) -> AsyncIterator[tuple[WorkerPool, WorkerReady]]:
    """Starts workers, yields their pool and the first worker's `WorkerReady`, and ends the workers afterwards.

    Args:
      checkpoint: directory of the model.
      capacity: number of sessions that the pool has room for.
      workers: number of worker processes. Without a mesh each worker has one device. With a mesh there is one worker,
        which has all devices.
      on_tick: as in `Scheduler`.
      mesh: the mesh of all devices that share the model, as `MeshShape.parse` reads it; empty: one device.

    Raises:
      InputError: the checkpoint cannot be served, or there are more workers than sessions.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= capacity:
        raise InputError(f"{workers} workers for {capacity} sessions: use at least 1 and at most one per session")
    capacities = _split_evenly(capacity, workers)
    pinned = [cores[index % len(cores)] if workers > 1 else None for index in range(workers)]
    results = await asyncio.gather(
        *(WorkerProcess.start(checkpoint, size, core, mesh) for size, core in zip(capacities, pinned, strict=True)),
        return_exceptions=True,
    )
    started = [worker for worker in results if isinstance(worker, WorkerProcess)]
    try:
        for result in results:
            if isinstance(result, BaseException):
                raise result
        groups = [
            (group, worker, size)
            for worker, worker_capacity in zip(started, capacities, strict=True)
            for group, size in enumerate(_split_evenly(worker_capacity, worker.ready.groups))
        ]
        groups.sort(key=lambda group: group[0])  # ticks of one worker's groups are then as far apart as possible
        schedulers = [Scheduler(worker, size, on_tick=on_tick, group=group) for group, worker, size in groups]
        yield WorkerPool(schedulers, started), started[0].ready
    finally:
        await asyncio.gather(*(worker.close() for worker in started))


def _split_evenly(n: int, parts: int) -> list[int]:
    """Splits `n` into `parts` sizes that differ by at most one."""
    return [n // parts + (index < n % parts) for index in range(parts)]


async def _run_after(delay_s: float, scheduler: Scheduler) -> None:
    await asyncio.sleep(delay_s)
    await scheduler.run()
