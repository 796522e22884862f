"""A hub without real time and without another process: the clock goes on when a test says so."""

from __future__ import annotations

import asyncio
from typing import cast

from jaxtml.serve.hub import TICK_S
from jaxtml.serve.slots import Slots
from jaxtml.serve.wire import Tick, Told, packed, unpacked
from jaxtml.serve.worker import answer


class Stepped:
    """A clock that stands still until it is told to `go`."""

    def __init__(self) -> None:
        self.time = self.end = 0.0
        self.more, self.idle = asyncio.Event(), asyncio.Event()
        self.running: list[asyncio.Task[None]] = []

    def now(self) -> float:
        return self.time

    async def until(self, due: float) -> None:
        while due > self.end + 1e-6:
            self.idle.set()
            self.more.clear()
            await self.more.wait()
        self.time = max(self.time, due)

    async def go(self, ticks: float) -> None:
        self.end += ticks * TICK_S
        self.idle.clear()
        self.more.set()
        idle = asyncio.create_task(self.idle.wait())
        await asyncio.wait({idle, *self.running}, return_when=asyncio.FIRST_COMPLETED)
        for task in self.running:
            if task.done():
                task.result()


class Here:
    """The worker without its process. A tick takes `takes_s` of the clock."""

    def __init__(self, slots: Slots, clock: Stepped):
        self.slots, self.clock, self.takes_s = slots, clock, 0.0
        self.ticks: list[Tick] = []

    async def tick(self, tick: Tick) -> Told:
        self.ticks.append(tick)
        self.clock.time += self.takes_s
        told = unpacked(packed(answer(self.slots, cast(Tick, unpacked(packed(tick)[4:]))))[4:])
        assert isinstance(told, Told)
        return told
