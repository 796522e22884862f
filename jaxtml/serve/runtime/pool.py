"""The workers of a server, side by side: a session lives in one of them from its beginning to its end.

One worker has all devices of a mesh. On a CPU there are as many as cores, each on its own: the products of a small
model are too small for two cores to share; and a worker has its sessions in groups (`slots.grouped`), for each of which
there is a hub. The clocks of hubs are apart by parts of a tick, so that neither a worker nor the process that has the
network is asked by all at once.
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

OnTick = Callable[[float, float], None]


class WorkerPool:
    """Sessions over `hubs`, whose workers are at the other ends of `links`."""

    def __init__(self, hubs: Sequence[Scheduler], links: Sequence[WorkerProcess] = ()):
        self.schedulers, self.workers = tuple(hubs), tuple(links)

    @property
    def capacity(self) -> int:
        return sum(hub.capacity for hub in self.schedulers)

    @property
    def sessions(self) -> list[ScheduledSession]:
        return list(itertools.chain.from_iterable(hub.sessions.values() for hub in self.schedulers))

    def admit(self, seed: int, grace_s: float = 30.0) -> ScheduledSession:
        """A session where there are fewest. Raises as `check`."""
        self.check_capacity()
        return min(filter(Scheduler.free_slots, self.schedulers), key=lambda hub: len(hub.sessions)).admit(
            seed, grace_s
        )

    def check_capacity(self) -> None:
        """Raises `ServerFull` where there is no room, with the shortest time that any of them names."""
        if not any(hub.free_slots() for hub in self.schedulers):
            raise ServerFull(min(hub.retry_after_s() for hub in self.schedulers))

    async def run(self) -> None:
        """Ticks of all until it is cancelled, or one worker is gone (`ConnectionError`), which ends them all."""
        tasks = [
            asyncio.create_task(_later(TICK_S * at / len(self.schedulers), hub))
            for at, hub in enumerate(self.schedulers)
        ]
        tasks += [asyncio.create_task(link.gone()) for link in self.workers]
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
    """A pool that has room for `capacity` sessions, and the first word of its workers, which end with it.

    Each of the `workers` has one device, or the only one a `mesh` (as `MeshShape.parse` reads it).

    Raises:
      InputError: what is wrong with the checkpoint, or more workers than sessions.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= capacity:
        raise InputError(f"{workers} workers for {capacity} sessions: each has one at least")
    shares = _shares(capacity, workers)
    pinned = [cores[at % len(cores)] if workers > 1 else None for at in range(workers)]
    begun = await asyncio.gather(
        *(WorkerProcess.start(checkpoint, share, core, mesh) for share, core in zip(shares, pinned, strict=True)),
        return_exceptions=True,
    )
    links = [link for link in begun if isinstance(link, WorkerProcess)]
    try:
        for link in begun:
            if isinstance(link, BaseException):
                raise link
        rooms = [
            (at, link, room)
            for link, share in zip(links, shares, strict=True)
            for at, room in enumerate(_shares(share, link.ready.groups))
        ]
        rooms.sort(key=lambda room: room[0])  # those of one worker are as far apart as they can be
        yield (
            WorkerPool([Scheduler(link, room, on_tick=on_tick, group=at) for at, link, room in rooms], links),
            links[0].ready,
        )
    finally:
        await asyncio.gather(*(link.close() for link in links))


def _shares(whole: int, parts: int) -> list[int]:
    """Of `parts`, that differ by one at most."""
    return [whole // parts + (at < whole % parts) for at in range(parts)]


async def _later(after_s: float, hub: Scheduler) -> None:
    await asyncio.sleep(after_s)
    await hub.run()
