"""A hub without real time and without another process: the clock goes on when a test says so."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np

from jaxtml.serve.runtime.scheduler import TICK_S
from jaxtml.serve.runtime.wire import Tick, TickReply, decode, encode
from jaxtml.serve.runtime.worker import run_tick
from jaxtml.session.slots import Slots
from jaxtml.stream.tokens import Control


class SteppedClock:
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

    async def advance(self, ticks: float) -> None:
        self.end += ticks * TICK_S
        self.idle.clear()
        self.more.set()
        idle = asyncio.create_task(self.idle.wait())
        await asyncio.wait({idle, *self.running}, return_when=asyncio.FIRST_COMPLETED)
        for task in self.running:
            if task.done():
                task.result()


class InProcessWorker:
    """The worker without its process. A tick takes `takes_s` of the clock."""

    def __init__(self, slots: Slots, clock: SteppedClock):
        self.slots, self.clock, self.takes_s = slots, clock, 0.0
        self.ticks: list[Tick] = []

    async def tick(self, tick: Tick) -> TickReply:
        self.ticks.append(tick)
        self.clock.time += self.takes_s
        told = decode(encode(run_tick(self.slots, cast(Tick, decode(encode(tick)[4:]))))[4:])
        assert isinstance(told, TickReply)
        return told


Script = Mapping[int, tuple[Control | str, ...]]


def scripted(script: Script) -> Callable[[Slots, SteppedClock], InProcessWorker]:
    """A worker whose model says what is written: controls and texts by the number of the tick, from 1 on; silence in
    all others. Its sound is the model's own."""

    class Scripted(InProcessWorker):
        async def tick(self, tick: Tick) -> TickReply:
            told = await super().tick(tick)
            config, codec = self.slots.engine.config.duplex, self.slots.engine.codec
            said = script.get(len(self.ticks), (Control.LISTEN,))
            tokens = [
                token
                for one in said
                for token in (codec.encode(one) if isinstance(one, str) else [config.control_base + one])
            ]
            speaking = said[-1] is Control.SPEAK
            outputs = {
                session: dataclasses.replace(one, tokens=np.array(tokens, np.int32), speaking=speaking)
                for session, one in told.outputs.items()
            }
            return dataclasses.replace(told, outputs=outputs)

    return Scripted
