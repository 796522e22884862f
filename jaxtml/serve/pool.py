"""The workers of a server, side by side: a session lives in one of them from its beginning to its end.

One worker has all devices of a mesh. On a CPU there are as many as cores, each on its own: the products of a small
model are too small for two cores to share. With two a core each has half the sessions: ticks in which many speak are
shorter, and fewer are late, for a quarter more work and twice the memory. Their clocks are apart by parts of a tick, so
that the process that has the network is not asked by all at once.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from jaxtml.errors import InputError
from jaxtml.serve.hub import TICK_S, Full, Hub, Session
from jaxtml.serve.link import Link
from jaxtml.serve.wire import Ready, Told

OnTick = Callable[[float, float, Told], None]


class Pool:
    """Sessions over `hubs`, whose workers are at the other ends of `links`."""

    def __init__(self, hubs: Sequence[Hub], links: Sequence[Link] = ()):
        self.hubs, self.links = tuple(hubs), tuple(links)

    @property
    def capacity(self) -> int:
        return sum(hub.capacity for hub in self.hubs)

    @property
    def sessions(self) -> list[Session]:
        return list(itertools.chain.from_iterable(hub.sessions.values() for hub in self.hubs))

    def admit(self, seed: int, grace_s: float = 30.0) -> Session:
        """A session where there is most room. Raises `Full`, with the shortest time that any of them names."""
        for hub in sorted(self.hubs, key=Hub.free, reverse=True):
            if hub.free():
                return hub.admit(seed, grace_s)
        raise Full(min(hub.retry_after_s() for hub in self.hubs))

    async def run(self) -> None:
        """Ticks of all until it is cancelled, or one worker is gone (`ConnectionError`), which ends them all."""
        tasks = [asyncio.create_task(_later(TICK_S * at / len(self.hubs), hub)) for at, hub in enumerate(self.hubs)]
        tasks += [asyncio.create_task(link.gone()) for link in self.links]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def started(
    checkpoint: str | Path,
    capacity: int,
    workers: int,
    on_tick: OnTick = lambda took_s, late_s, told: None,
    mesh: str = "",
) -> AsyncIterator[tuple[Pool, Ready]]:
    """A pool that has room for `capacity` sessions, and the first word of its workers, which end with it.

    Each of the `workers` has one device, or the only one a `mesh` (as `MeshShape.parse` reads it).

    Raises:
      InputError: what is wrong with the checkpoint, or more workers than sessions.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= capacity:
        raise InputError(f"{workers} workers for {capacity} sessions: each has one at least")
    shares = [capacity // workers + (at < capacity % workers) for at in range(workers)]
    pinned = [cores[at % len(cores)] if workers > 1 else None for at in range(workers)]
    begun = await asyncio.gather(
        *(Link.start(checkpoint, share, core, mesh) for share, core in zip(shares, pinned, strict=True)),
        return_exceptions=True,
    )
    links = [link for link in begun if isinstance(link, Link)]
    try:
        for link in begun:
            if isinstance(link, BaseException):
                raise link
        hubs = [Hub(link, share, on_tick=on_tick) for link, share in zip(links, shares, strict=True)]
        yield Pool(hubs, links), links[0].ready
    finally:
        await asyncio.gather(*(link.close() for link in links))


async def _later(after_s: float, hub: Hub) -> None:
    await asyncio.sleep(after_s)
    await hub.run()
