"""One connection: reads what its protocol takes, writes what an outbox has, and is watched.

It runs over a line, which is a WebSocket (`WebSocketTransport`) or the data channel of a peer (`serve.transport.peer`).

The rules. A client that sends more than the session has room for is not read until there is room: TCP holds it back. So
is one that sends messages faster than `_PER_SECOND`, or pings and pongs faster than `_PINGS_PER_SECOND`; between two
messages of one client everyone else has a turn. One that takes nothing for as long as the outbox keeps is given
up. One from which nothing is heard, answers to pings included, for `_SILENT_S` is taken for gone.

Called by the handlers of the protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Protocol

from absl import logging
from aiohttp import WSMsgType, web

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.transport.replay_buffer import ReplayBuffer, ReplayLost
from jaxtml.serve.transport.token_bucket import TokenBucket

MESSAGE_BYTES = 2**20  # the largest that is read
_PER_SECOND, _BURST = 250, 1000  # messages; sound in packets of 10 ms are 100
_PINGS_PER_SECOND, _PINGS_BURST = 20, 40
_UNIT = 2048  # bytes: half a megabyte a second, and two at once, are ten times what sound is
_LOOK_S, _PING_S, _SILENT_S = 1.0, 5.0, 20.0
GOODBYE_S = 3.0  # for a client to answer that it is closed

MessageHandler = Callable[[bytes], Awaitable[None]]


class ConnectionEnd(Enum):
    """How a connection came to its end."""

    DONE = auto()  # all was sent, nothing more comes
    LEFT = auto()  # the client closed it as one does who is done
    GONE = auto()  # the client is not there any more
    SLOW = auto()  # the client took nothing for too long
    REPLACED = auto()  # the client is back over another one


class Transport(Protocol):
    """What a connection runs over.

    Attributes:
      heard_at: when anything came from the client, on the monotonic clock.
      left: the client has closed it as one does who is done.
    """

    heard_at: float
    left: bool

    async def receive(self) -> bytes | None:
        """The next message; None where the client is gone."""
        ...

    async def send(self, frame: bytes) -> None:
        """Waits where the client does not take it. Raises `ConnectionError` where it is gone."""
        ...

    async def ping(self) -> None:
        """Asks for a sign of life."""
        ...

    def unsent(self) -> int:
        """Bytes that the network has not taken."""
        ...

    async def close(self, code: int, why: str) -> None:
        """Says goodbye, with a code of the WebSocket protocol where that can be said; cuts off who does not listen."""
        ...


def new_websocket() -> web.WebSocketResponse:
    """A WebSocket as `WebSocketTransport` wants it: pings and pongs are its own, text comes as bytes."""
    return web.WebSocketResponse(
        autoping=False,
        compress=False,
        max_msg_size=MESSAGE_BYTES,
        decode_text=False,
        protocols=("realtime",),
        timeout=GOODBYE_S,
    )


class WebSocketTransport:
    """A WebSocket, from `new_websocket` and prepared; a `Transport`. `kind` is that of the messages it sends."""

    def __init__(self, request: web.Request, ws: web.WebSocketResponse, kind: WSMsgType):
        self.ws, self.kind = ws, kind
        self._transport = request.transport
        self.heard_at, self.left = time.monotonic(), False
        self._pings = TokenBucket(_PINGS_PER_SECOND, _PINGS_BURST)

    async def receive(self) -> bytes | None:
        while True:
            message = await self.ws.receive()
            self.heard_at = time.monotonic()
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                return message.data
            if message.type in (WSMsgType.PING, WSMsgType.PONG):
                if message.type is WSMsgType.PING:
                    await self.ws.pong(message.data)
                await asyncio.sleep(self._pings.wait(1))
            else:
                self.left = message.type is WSMsgType.CLOSE and message.data == 1000
                return None

    async def send(self, frame: bytes) -> None:
        await self.ws.send_frame(frame, self.kind)

    async def ping(self) -> None:
        await self.ws.ping()

    def unsent(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    async def close(self, code: int, why: str) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(self.ws.close(code=code, message=why.encode()[:120]), 2 * GOODBYE_S)
        if self._transport is not None and self.unsent():
            self._transport.abort()


class Connection:
    """An open line.

    Args:
      line: what it runs over.
      metrics: what is counted.
    """

    def __init__(self, line: Transport, metrics: Metrics):
        self.transport, self.metrics = line, metrics
        self._waits = False  # for room: then it is not read, and its silence says nothing
        self._allowance = TokenBucket(_PER_SECOND, _BURST)
        self._replaced = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._written = 0

    def replace(self) -> None:
        """Another connection has taken over: from this moment on, nothing of this one is taken."""
        self._replaced.set()
        if self._reading is not None:
            self._reading.cancel()

    async def receive(self) -> bytes | None:
        """The next message; None where the client is gone. Those that come too fast wait."""
        message = await self.transport.receive()
        if message is not None:
            await self._pace(len(message))
        return message

    async def send(self, frame: bytes) -> None:
        """Waits where the client does not take it."""
        await self.transport.send(frame)

    async def run(self, outbox: ReplayBuffer, after: int, receive: MessageHandler) -> ConnectionEnd:
        """Writes what the outbox has behind `after` and reads what the client says, until one of them ends."""
        self._written = after
        self._reading = asyncio.create_task(self._read(receive))
        others = (self._write(outbox), self._watch(outbox), self._replaced.wait(), self._last_words(outbox))
        tasks = [self._reading, *(asyncio.create_task(one) for one in others)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, (ConnectionError, ReplayLost)):
                logging.error("a connection failed", exc_info=result)
        if self._replaced.is_set():
            return ConnectionEnd.REPLACED
        if self._behind(outbox):
            return ConnectionEnd.SLOW
        if outbox.closed:
            return ConnectionEnd.DONE
        return ConnectionEnd.LEFT if self.transport.left else ConnectionEnd.GONE

    async def close(self, code: int, why: str = "") -> None:
        """Says goodbye; a client that does not listen is cut off."""
        await self.transport.close(code, why)

    async def _read(self, receive: MessageHandler) -> None:
        while (message := await self.receive()) is not None and not self._replaced.is_set():
            self._waits = True
            await receive(message)
            self._waits = False
            self.transport.heard_at = time.monotonic()

    def _behind(self, outbox: ReplayBuffer) -> bool:
        """Something that was not written is no longer kept."""
        return outbox.last_number - self._written > len(outbox.frames)

    async def _write(self, outbox: ReplayBuffer) -> None:
        sent_at = None
        while frames := await outbox.frames_after(self._written):
            for frame in frames:
                await self.send(frame)
                self._written += 1
            now = time.monotonic()
            if sent_at is not None:
                self.metrics.output_gap.observe(now - sent_at)
            sent_at = now

    async def _last_words(self, outbox: ReplayBuffer) -> None:
        """Until the outbox was closed, and what was in it should have been taken."""
        await outbox.wait_closed()
        await asyncio.sleep(GOODBYE_S)

    async def _watch(self, outbox: ReplayBuffer) -> None:
        """Until nothing is heard any more, or nothing is taken."""
        pinged_at = time.monotonic()
        while self._waits or time.monotonic() < self.transport.heard_at + _SILENT_S:
            await asyncio.sleep(_LOOK_S)
            if self._behind(outbox):  # the writer itself waits in the midst of a frame
                return
            if time.monotonic() > pinged_at + _PING_S and not self.transport.unsent():
                await self.transport.ping()
                pinged_at = time.monotonic()

    async def _pace(self, size: int) -> None:
        """A message counts as one, or as many as it has `_UNIT` bytes. Reading what has arrived already never waits."""
        await asyncio.sleep(self._allowance.wait(1 + size / _UNIT))
