"""A connection: reads a client's messages for a protocol, writes a replay buffer's frames, and detects a lost client.

Called by the routes of the protocols. A connection runs over a `Transport`: a WebSocket (`WebSocketTransport`) or the
data channel of a WebRTC peer (`serve.transport.peer`). A session outlives its connections.

The rules, which the tests hold:

- If a client sends more audio than its session has room for, the server reads a little ahead. It then reads nothing
  until there is room, and TCP holds the client back. If the client closes the connection meanwhile, and its Close frame
  was read ahead, the connection ends within `_LAST_S`, even if messages still wait.
- If a client sends messages or pings too fast, the server waits before it reads more, and TCP holds the client back.
  Between two messages of one client, all other clients get a turn.
- A message takes at most twice `MESSAGE_BYTES` on the wire. This bounds the fragments of a message that never ends.
- The replay buffer drops old frames. If it drops a frame that the client has not taken yet, the connection ends.
- A client from which nothing arrives for `_SILENT_S`, not even the answer to a ping, counts as gone.
- `serve.transport.endings` says what each end of a connection means for the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from absl import logging
from aiohttp import WebSocketError, WSMessage, WSMsgType, web

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.transport.endings import INVALID_CODES, NO_CLOSE_FRAME, NO_CODE, ConnectionEnd, client_closed
from jaxtml.serve.transport.replay_buffer import ReplayBuffer, ReplayLost
from jaxtml.serve.transport.token_bucket import TokenBucket

# The largest message that is read. OpenAI's API takes 15 MiB of audio in a message; these are 20 MiB in base64, and a
# little more if the base64 is wrapped in lines.
MESSAGE_BYTES = 22 * 2**20
# A client may split a message into fragments, each with a header (RFC 6455, section 5.4). aiohttp bounds the content
# of all fragments, but not their number, and fragments may be empty.
_WIRE_BYTES_PER_BYTE = 2
_CONTROL_HEADER_BYTES = 6  # of a ping or pong from a client
# While a message waits for room in the session, further messages are read as long as fewer bytes than these wait. These
# are 65 s of sound in base64. So a connection holds at most two messages and this much more.
_AHEAD_BYTES = 4 * 2**20
_LAST_S = 1.0  # for messages that were read ahead to be handled after their client has closed the connection
_TOO_LARGE = 1009  # close code
_REST_S = 2.0  # for a client to send the rest of a message that is too large
_MESSAGES_PER_SECOND, _MESSAGES_BURST = 250, 1000  # audio in packets of 10 ms needs 100 per second
_PINGS_PER_SECOND, _PINGS_BURST = 20, 40
# A message costs one token, plus one token per `_UNIT_BYTES` of its size. So a client may send two megabytes per
# second, and eight megabytes in a burst, which is a large photo. To read a megabyte takes about 9 ms.
_UNIT_BYTES = 8192
_WATCH_S, _PING_S = 1.0, 5.0  # from one check of the client to the next, and from one ping to the next
_SILENT_S = 20.0  # a client from which nothing arrives for this time counts as gone
CLOSE_TIMEOUT_S = 3.0  # for a client to confirm that its connection is closed

MessageHandler = Callable[[bytes], Awaitable[None]]


class Transport(Protocol):
    """What a connection runs over.

    Attributes:
      heard_at: when anything last arrived from the client, on the monotonic clock.
      end: how the transport ended, as far as it can tell: LEFT, AWAY, INVALID or, otherwise, GONE.
      close_code: close code of the WebSocket protocol with which it ended; None: it has not ended, or has no codes.
    """

    heard_at: float
    end: ConnectionEnd
    close_code: int | None

    async def receive(self) -> bytes | None:
        """Waits for the next message and returns it; None: the client is gone."""
        ...

    async def send(self, frame: bytes) -> None:
        """Sends a frame, and waits while the client does not take it. Raises `ConnectionError` if it is gone."""
        ...

    async def ping(self) -> None:
        """Asks the client for a sign of life."""
        ...

    def unsent(self) -> int:
        """Returns the number of bytes that the network has not taken."""
        ...

    async def close(self, code: int, reason: str) -> None:
        """Closes the transport, with a close code of the WebSocket protocol if it can carry one.

        A client that does not confirm in time is cut off.
        """
        ...


def new_websocket() -> web.WebSocketResponse:
    """Returns a WebSocket for `WebSocketTransport`. It does not answer pings by itself, and delivers text as bytes."""
    return _WebSocket(
        autoping=False,
        compress=False,
        max_msg_size=MESSAGE_BYTES,
        decode_text=False,
        protocols=("realtime",),
        timeout=CLOSE_TIMEOUT_S,
    )


class _WebSocket(web.WebSocketResponse):
    """A WebSocket that stays open after a message that is too large, so that its client can be told.

    After such a message aiohttp reads nothing more, and its method `receive` calls `close`. Here this call of `close`
    does nothing. The owner of the WebSocket sends an error and then calls `close` again.

    Attributes:
      told: whether `close` closes the WebSocket after a message that is too large.
    """

    told = False

    async def close(self, *, code: int = 1000, message: bytes = b"", drain: bool = True) -> bool:
        if code == _TOO_LARGE and not self.told:
            self.told = True
            return True
        return await super().close(code=code, message=message, drain=drain)


class _WireMeter(asyncio.Protocol):
    """Passes on what a client sends, and drops everything after a message that takes too many bytes on the wire.

    It stands between the network and aiohttp, because aiohttp tells nobody of fragments.

    Args:
      transport: the network connection of a WebSocket.
      on_overflow: called once, when a message has taken too many bytes.

    Attributes:
      overflown: whether a message has taken too many bytes.
    """

    def __init__(self, transport: asyncio.Transport, on_overflow: Callable[[], None]):
        handler = transport.get_protocol()
        assert isinstance(handler, asyncio.Protocol)
        self._handler, self._on_overflow = handler, on_overflow
        self._bytes, self.overflown = 0, False
        self.connection_lost, self.eof_received = handler.connection_lost, handler.eof_received
        self.pause_writing, self.resume_writing = handler.pause_writing, handler.resume_writing
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with the bytes that have arrived."""
        if self.overflown:
            return
        self._bytes += len(data)
        if self._bytes > _WIRE_BYTES_PER_BYTE * MESSAGE_BYTES:
            self.overflown = True
            self._on_overflow()
        else:
            self._handler.data_received(data)

    def message_read(self) -> None:
        """Begins to count again, because a message was complete."""
        self._bytes = 0

    def control_read(self, size: int) -> None:
        """Leaves a ping or pong of `size` bytes out of the count: it belongs to no message."""
        self._bytes = max(0, self._bytes - size - _CONTROL_HEADER_BYTES)


class WebSocketTransport:
    """A `Transport` over a WebSocket.

    Args:
      request: the request that opened the WebSocket.
      ws: a WebSocket from `new_websocket` whose method `prepare` has been called.
      kind: the type of the messages that the server sends, text or binary.
    """

    def __init__(self, request: web.Request, ws: web.WebSocketResponse, kind: WSMsgType):
        self.ws, self.kind = ws, kind
        self._transport = request.transport
        self.heard_at, self.end = time.monotonic(), ConnectionEnd.GONE
        self.close_code: int | None = None
        self._pings = TokenBucket(_PINGS_PER_SECOND, _PINGS_BURST)
        self._reading: asyncio.Timeout | None = None  # in which the next message is waited for
        self._meter = None if self._transport is None else _WireMeter(self._transport, self._stop_reading)

    async def receive(self) -> bytes | None:
        while not self._overflown:
            try:
                async with asyncio.timeout(None) as self._reading:
                    message = await self.ws.receive()
            except TimeoutError:
                break
            finally:
                self._reading = None
            self.heard_at = time.monotonic()
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                if self._meter is not None:
                    self._meter.message_read()
                return message.data
            if message.type in (WSMsgType.PING, WSMsgType.PONG):
                if self._meter is not None:
                    self._meter.control_read(len(message.data))
                if message.type is WSMsgType.PING:
                    await self.ws.pong(message.data)
                await asyncio.sleep(self._pings.take(1))
            else:
                self._note_end(message)
                return None
        self._note_overflow()
        return None

    @property
    def _overflown(self) -> bool:
        return self._meter is not None and self._meter.overflown

    def _stop_reading(self) -> None:
        """Ends the wait for a message that never ends."""
        if self._reading is not None:
            self._reading.reschedule(0)

    def _note_overflow(self) -> None:
        """Notes that the client's message took too many bytes on the wire. The WebSocket can still send frames."""
        self.close_code, self.end = _TOO_LARGE, ConnectionEnd.INVALID
        if isinstance(self.ws, _WebSocket):
            self.ws.told = True
        logging.warning("a client's WebSocket message cannot be read: its fragments are too many")

    def _note_end(self, message: WSMessage) -> None:
        """Notes how the WebSocket ended, from the last message that aiohttp gives."""
        if message.type is WSMsgType.CLOSE:
            self.close_code, self.end = message.data or NO_CODE, client_closed(message.data)
        elif isinstance(message.data, WebSocketError) and message.data.code in INVALID_CODES:
            self.close_code, self.end = message.data.code, ConnectionEnd.INVALID
            logging.warning("a client's WebSocket message cannot be read: %s", message.data)
        else:
            self.close_code = NO_CLOSE_FRAME

    async def send(self, frame: bytes) -> None:
        await self.ws.send_frame(frame, self.kind)

    async def ping(self) -> None:
        await self.ws.ping()

    def unsent(self) -> int:
        try:
            return 0 if self._transport is None else self._transport.get_write_buffer_size()
        except AttributeError:  # asyncio's transport for TLS forgets its connection when it is closed a second time
            return 0

    async def close(self, code: int, reason: str) -> None:
        if self.close_code == _TOO_LARGE:
            await self._let_client_finish()
        # After a message that never ended nothing more is read, so the client's confirmation would not be seen.
        patience_s = _REST_S if self._overflown else 2 * CLOSE_TIMEOUT_S
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(self.ws.close(code=code, message=reason.encode()[:120]), patience_s)
        if self._transport is not None and (self.unsent() or self._overflown):
            self._transport.abort()

    async def _let_client_finish(self) -> None:
        """Waits until the client has sent the rest of a message that is too large, which aiohttp discards.

        A connection that is closed while its client still sends is reset. Many clients then lose the error that was
        sent to them before the reset.
        """
        until = time.monotonic() + _REST_S
        while time.monotonic() < until and self._transport is not None and not self._transport.is_closing():
            await asyncio.sleep(0.05)


class Connection:
    """An open connection to a client.

    Args:
      transport: what it runs over.
      metrics: records the time between writes.
    """

    def __init__(self, transport: Transport, metrics: Metrics):
        self.transport, self.metrics = transport, metrics
        # True while the next message may not be read yet. Nothing is read then, so no sign of life is expected.
        self._paused = False
        self._messages = TokenBucket(_MESSAGES_PER_SECOND, _MESSAGES_BURST)
        self._replaced = asyncio.Event()
        self._ahead: deque[bytes] = deque()  # messages that were read while another one is handled
        self._ahead_bytes = 0
        self._idle = True  # whether no message is handled now
        self._progress = asyncio.Event()  # set when a message was read or handled
        self._taking: tuple[asyncio.Task[None], ...] = ()  # the tasks that read and handle messages
        self._written = 0  # number of the last frame that was written

    @property
    def close_code(self) -> int | None:
        """The close code with which the client's side ended, as `Transport.close_code`."""
        return self.transport.close_code

    @property
    def message_was_too_large(self) -> bool:
        """Whether the connection has ended because of a message that is too large. It can still send frames."""
        return self.transport.close_code == _TOO_LARGE

    def replace(self) -> None:
        """Stops taking messages at once: another connection has taken over the session."""
        self._replaced.set()
        for task in self._taking:
            task.cancel()

    async def receive(self) -> bytes | None:
        """Waits for the next message and returns it; None: the client is gone, or its message is too large.

        After messages that came too fast, the next one is read later.
        """
        self._paused = True
        # Sleep even for zero seconds: reading a message that has already arrived does not yield to the event loop.
        await asyncio.sleep(self._messages.take(0))
        self._paused = False
        self.transport.heard_at = time.monotonic()
        message = await self.transport.receive()
        if message is not None:
            self._messages.take(1 + len(message) / _UNIT_BYTES)
        return message

    async def send(self, frame: bytes) -> None:
        """Sends a frame, and waits while the client does not take it."""
        await self.transport.send(frame)

    async def run(self, replay_buffer: ReplayBuffer, after: int, on_message: MessageHandler) -> ConnectionEnd:
        """Writes frames and reads messages until the connection ends.

        Args:
          replay_buffer: the frames to write.
          after: number of the last frame that the client already has.
          on_message: called with each message, one after the other.
        """
        self._written = after
        self._taking = (asyncio.create_task(self._read()), asyncio.create_task(self._handle(on_message)))
        others = (
            self._write(replay_buffer),
            self._watch(replay_buffer),
            self._replaced.wait(),
            self._wait_written(replay_buffer),
        )
        tasks = [*self._taking, *(asyncio.create_task(coroutine) for coroutine in others)]
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
        if self._has_lost_frames(replay_buffer):
            return ConnectionEnd.SLOW
        if replay_buffer.closed:
            return ConnectionEnd.DONE
        return self.transport.end

    async def send_last(self, replay_buffer: ReplayBuffer) -> None:
        """Sends the frames that `run` has not sent. A client that does not take them in time does not get them."""
        if replay_buffer.last_number > self._written and not self._has_lost_frames(replay_buffer):
            with contextlib.suppress(TimeoutError, ConnectionError):
                for frame in await replay_buffer.frames_after(self._written):
                    await asyncio.wait_for(self.send(frame), CLOSE_TIMEOUT_S)

    async def close(self, code: int, reason: str = "") -> None:
        """Closes the connection. A client that does not confirm in time is cut off."""
        await self.transport.close(code, reason)

    async def _read(self) -> None:
        """Reads messages for `_handle`. Returns when the client's side has ended."""
        while (message := await self.receive()) is not None:
            self._ahead.append(message)
            self._ahead_bytes += len(message)
            self._progress.set()
            self._paused = True
            await self._wait_until(lambda: self._ahead_bytes < _AHEAD_BYTES)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wait_until(lambda: self._idle and not self._ahead), _LAST_S)

    async def _handle(self, on_message: MessageHandler) -> None:
        """Hands messages to `on_message`, one after the other."""
        while True:
            await self._wait_until(lambda: bool(self._ahead))
            message = self._ahead.popleft()
            self._ahead_bytes -= len(message)
            self._idle = False
            self._progress.set()
            await on_message(message)
            self._idle = True
            self._progress.set()
            await asyncio.sleep(0)  # many small messages may wait: let other clients have a turn

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until the messages that were read and handled fulfil `condition`."""
        while not condition():
            self._progress.clear()
            await self._progress.wait()

    def _has_lost_frames(self, replay_buffer: ReplayBuffer) -> bool:
        """Returns whether the replay buffer has dropped a frame before it was written."""
        return replay_buffer.last_number - self._written > len(replay_buffer.frames)

    async def _write(self, replay_buffer: ReplayBuffer) -> None:
        written_at = None
        while frames := await replay_buffer.frames_after(self._written):
            for frame in frames:
                await self.send(frame)
                self._written += 1
            now = time.monotonic()
            if written_at is not None:
                self.metrics.output_gap.observe(now - written_at)
            written_at = now

    async def _wait_written(self, replay_buffer: ReplayBuffer) -> None:
        """Waits until the replay buffer is closed, and then as long as the client may take to get the last frames."""
        await replay_buffer.wait_closed()
        await asyncio.sleep(CLOSE_TIMEOUT_S)

    async def _watch(self, replay_buffer: ReplayBuffer) -> None:
        """Returns when nothing has arrived from the client for too long, or the client has missed frames."""
        pinged_at = time.monotonic()
        while self._paused or time.monotonic() < self.transport.heard_at + _SILENT_S:
            await asyncio.sleep(_WATCH_S)
            if self._has_lost_frames(replay_buffer):  # `_write` cannot notice: it still waits to send a frame
                return
            if time.monotonic() > pinged_at + _PING_S and not self.transport.unsent():
                await self.transport.ping()
                pinged_at = time.monotonic()
