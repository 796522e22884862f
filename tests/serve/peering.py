"""A peer as aiortc makes one, beside `serving`: it says a tone and keeps what it hears."""

from __future__ import annotations

import asyncio
import fractions
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from jaxtml.serve.runtime.wire import Tick, TickReply
from jaxtml.session.slots import Slots
from tests.serve.serving import WAIT_S
from tests.serve.stepped import InProcessWorker, Script, SteppedClock, scripted

RATE = 48_000


def tone(hz: float, start: int, count: int, rate: int) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * (start + np.arange(count)) / rate)).astype(np.float32)


def loudest(samples: np.ndarray, rate: int) -> float:
    """Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * rate / len(samples)


class Mouth(MediaStreamTrack):
    """A tone in packets of 20 ms."""

    kind = "audio"

    def __init__(self, hz: float):
        super().__init__()
        self.hz, self.sent, self.began = hz, 0, time.monotonic()

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(self.began + self.sent / RATE - time.monotonic())
        samples = tone(self.hz, self.sent, 960, RATE)
        both = np.repeat((samples * 2**15).astype(np.int16), 2)[None]
        frame = av.AudioFrame.from_ndarray(both, "s16", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self.sent, fractions.Fraction(1, RATE)
        self.sent += 960
        return frame


class Caller:
    """A peer, all events that came over its data channel, and the last two seconds that it heard."""

    def __init__(self, *tracks: MediaStreamTrack):
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.channel = self.pc.createDataChannel("oai-events")
        self.events: list[dict[str, Any]] = []
        self._pieces: deque[np.ndarray] = deque(maxlen=100)
        self._new: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.channel.on("message", lambda text: self._new.put_nowait(json.loads(text)))
        self.channel.on("close", lambda: self._new.put_nowait(None))
        self.pc.on("track", lambda track: self._tasks.append(asyncio.create_task(self._listen(track))))
        for track in tracks:
            self.pc.addTrack(track)

    async def offer(self) -> str:
        await self.pc.setLocalDescription(await self.pc.createOffer())
        return self.pc.localDescription.sdp

    async def answered(self, sdp: str) -> None:
        await self.pc.setRemoteDescription(RTCSessionDescription(sdp, "answer"))

    def heard(self) -> np.ndarray:
        """`[N]` float32 at 48 kHz."""
        return np.concatenate([np.zeros(0, np.float32), *self._pieces])

    def send(self, kind: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": kind, **fields}))

    async def until(self, kind: str) -> dict[str, Any]:
        """The next event of that type. Raises `ConnectionError` where the data channel was closed."""
        async with asyncio.timeout(WAIT_S):
            while (event := await self._new.get()) is not None:
                self.events.append(event)
                if event["type"] == kind:
                    return event
        raise ConnectionError("closed")

    async def closed(self) -> None:
        """Reads until the data channel was closed."""
        while (event := await asyncio.wait_for(self._new.get(), WAIT_S)) is not None:
            self.events.append(event)

    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]

    def vanish(self) -> None:
        """Is gone without a word, as where the network is."""
        for protocol in self.pc.sctp.transport.transport._connection._protocols:
            protocol.transport.abort()

    async def _listen(self, track: MediaStreamTrack) -> None:
        try:
            while True:
                frame = await track.recv()
                samples = frame.to_ndarray().reshape(-1, 2)[:, 0].astype(np.float32) / 2**15
                self._pieces.append(samples)
        except MediaStreamError:
            pass

    async def close(self) -> None:
        await self.pc.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def calling(*tracks: MediaStreamTrack) -> AsyncIterator[Caller]:
    caller = Caller(*tracks)
    try:
        yield caller
    finally:
        await caller.close()


def singing(hz: float, script: Script) -> Callable[[Slots, SteppedClock], InProcessWorker]:
    """As `scripted`, and all its sound is a tone."""

    class Singing(scripted(script)):
        async def tick(self, tick: Tick) -> TickReply:
            told = await super().tick(tick)
            start = 3200 * len(self.ticks)
            outputs = {
                session: replace(one, wave=tone(hz, start, 3200, 16_000)) for session, one in told.outputs.items()
            }
            return replace(told, outputs=outputs)

    return Singing
