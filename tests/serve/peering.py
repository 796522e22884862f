"""A WebRTC client for tests, made with aiortc: it sends a tone and keeps what it hears.

The server is that of `tests.serve.serving`.
"""

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

RATE = 48_000  # Hz, as aiortc plays and records


def tone(hz: float, start: int, count: int, rate: int) -> np.ndarray:
    """Returns `count` samples of a tone from sample `start` on, `[count]` float32."""
    return (0.3 * np.sin(2 * np.pi * hz * (start + np.arange(count)) / rate)).astype(np.float32)


def loudest_hz(samples: np.ndarray, rate: int) -> float:
    """Returns the frequency of the loudest tone in `samples`."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * rate / len(samples)


class ToneTrack(MediaStreamTrack):
    """A microphone that records a tone, in packets of 20 ms."""

    kind = "audio"

    def __init__(self, hz: float):
        super().__init__()
        self.hz, self.sent, self.began_at = hz, 0, time.monotonic()

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(self.began_at + self.sent / RATE - time.monotonic())
        samples = tone(self.hz, self.sent, 960, RATE)
        stereo = np.repeat((samples * 2**15).astype(np.int16), 2)[None]
        frame = av.AudioFrame.from_ndarray(stereo, "s16", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self.sent, fractions.Fraction(1, RATE)
        self.sent += 960
        return frame


class PeerClient:
    """A WebRTC client.

    Attributes:
      events: all events that it has read from its data channel.
    """

    def __init__(self, *tracks: MediaStreamTrack):
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.channel = self.pc.createDataChannel("oai-events")
        self.events: list[dict[str, Any]] = []
        self._heard: deque[np.ndarray] = deque(maxlen=100)  # the last two seconds, in packets of 20 ms
        self._unread: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.channel.on("message", lambda text: self._unread.put_nowait(json.loads(text)))
        self.channel.on("close", lambda: self._unread.put_nowait(None))
        self.pc.on("track", lambda track: self._tasks.append(asyncio.create_task(self._listen(track))))
        for track in tracks:
            self.pc.addTrack(track)

    async def offer(self) -> str:
        """Returns its offer, in SDP."""
        await self.pc.setLocalDescription(await self.pc.createOffer())
        return self.pc.localDescription.sdp

    async def take_answer(self, sdp: str) -> None:
        """Takes the server's answer and connects."""
        await self.pc.setRemoteDescription(RTCSessionDescription(sdp, "answer"))

    def heard(self) -> np.ndarray:
        """Returns the last two seconds that it heard, `[N]` float32 at 48 kHz."""
        return np.concatenate([np.zeros(0, np.float32), *self._heard])

    def send(self, kind: str, **fields: Any) -> None:
        """Sends an event of type `kind`."""
        self.channel.send(json.dumps({"type": kind, **fields}))

    async def until(self, kind: str) -> dict[str, Any]:
        """Reads events up to the next one of type `kind`, and returns that one.

        Raises:
          ConnectionError: the data channel was closed.
        """
        async with asyncio.timeout(WAIT_S):
            while (event := await self._unread.get()) is not None:
                self.events.append(event)
                if event["type"] == kind:
                    return event
        raise ConnectionError("closed")

    async def closed(self) -> None:
        """Reads events until the data channel is closed."""
        while (event := await asyncio.wait_for(self._unread.get(), WAIT_S)) is not None:
            self.events.append(event)

    def kinds(self) -> list[str]:
        """Returns the types of the events that were read so far."""
        return [event["type"] for event in self.events]

    def vanish(self) -> None:
        """Disappears without closing anything, as if the network had failed."""
        assert self.pc.sctp is not None
        for protocol in self.pc.sctp.transport.transport._connection._protocols:
            protocol.transport.abort()

    async def _listen(self, track: MediaStreamTrack) -> None:
        try:
            while True:
                frame = await track.recv()
                assert isinstance(frame, av.AudioFrame)
                samples = frame.to_ndarray().reshape(-1, 2)[:, 0].astype(np.float32) / 2**15
                self._heard.append(samples)
        except MediaStreamError:
            pass

    async def close(self) -> None:
        """Closes the connection normally."""
        await self.pc.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def open_peer_client(*tracks: MediaStreamTrack) -> AsyncIterator[PeerClient]:
    """Yields a WebRTC client with these tracks, and closes it afterwards."""
    client = PeerClient(*tracks)
    try:
        yield client
    finally:
        await client.close()


def scripted_tone(hz: float, script: Script) -> Callable[[Slots, SteppedClock], InProcessWorker]:
    """Returns a subclass of the worker of `tests.serve.stepped.scripted`. Its audio is always a tone."""

    class ScriptedTone(scripted(script)):  # pyright: ignore[reportGeneralTypeIssues]
        async def tick(self, tick: Tick) -> TickReply:
            reply = await super().tick(tick)
            start = 3200 * len(self.ticks)
            outputs = {
                session: replace(output, wave=tone(hz, start, 3200, 16_000))
                for session, output in reply.outputs.items()
            }
            return replace(reply, outputs=outputs)

    return ScriptedTone  # pyright: ignore[reportReturnType]
