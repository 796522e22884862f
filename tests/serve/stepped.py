"""A clock that a test advances, and workers that run inside the test's process.

One worker gives the model's own outputs. The other one says what a script says.
"""

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
    """A scheduler's clock that stands still until a test calls `advance`.

    Attributes:
      time: the current time in seconds.
      end: the time up to which it may run.
      running: the tasks that run on it. If one of them fails, `advance` raises its error.
    """

    def __init__(self) -> None:
        self.time = self.end = 0.0
        self._advanced, self._idle = asyncio.Event(), asyncio.Event()
        self.running: list[asyncio.Task[None]] = []

    def now(self) -> float:
        return self.time

    async def until(self, due: float) -> None:
        while due > self.end + 1e-6:
            self._idle.set()
            self._advanced.clear()
            await self._advanced.wait()
        self.time = max(self.time, due)

    async def advance(self, ticks: float) -> None:
        """Moves the clock on by that many ticks, and returns when all work up to then is done."""
        self.end += ticks * TICK_S
        self._idle.clear()
        self._advanced.set()
        idle = asyncio.create_task(self._idle.wait())
        await asyncio.wait({idle, *self.running}, return_when=asyncio.FIRST_COMPLETED)
        for task in self.running:
            if task.done():
                task.result()


class InProcessWorker:
    """A worker without a process. Its messages go through the encoding that a real worker's messages go through.

    Attributes:
      takes_s: seconds of the clock that a tick takes.
      ticks: all ticks that it was asked for.
    """

    def __init__(self, slots: Slots, clock: SteppedClock):
        self.slots, self.clock, self.takes_s = slots, clock, 0.0
        self.ticks: list[Tick] = []

    async def tick(self, tick: Tick) -> TickReply:
        self.ticks.append(tick)
        self.clock.time += self.takes_s
        reply = decode(encode(run_tick(self.slots, cast(Tick, decode(encode(tick)[4:]))))[4:])
        assert isinstance(reply, TickReply)
        return reply


Script = Mapping[int, tuple[Control | str, ...]]  # what the model says, by the number of the tick, from 1 on


def scripted(script: Script) -> Callable[[Slots, SteppedClock], InProcessWorker]:
    """Returns a class of workers. Their model says what the script says, and listens in all other ticks.

    The audio is the model's own. Only the tokens, and whether the model speaks, come from the script.
    """

    class Scripted(InProcessWorker):
        async def tick(self, tick: Tick) -> TickReply:
            reply = await super().tick(tick)
            config, codec = self.slots.engine.config.duplex, self.slots.engine.codec
            items = script.get(len(self.ticks), (Control.LISTEN,))
            tokens = [
                token
                for item in items
                for token in (codec.encode(item) if isinstance(item, str) else [config.control_base + item])
            ]
            speaking = items[-1] is Control.SPEAK
            outputs = {
                session: dataclasses.replace(output, tokens=np.array(tokens, np.int32), speaking=speaking)
                for session, output in reply.outputs.items()
            }
            return dataclasses.replace(reply, outputs=outputs)

    return Scripted
