"""`serving` runs a test beside a real server on the loopback interface; `Client` speaks JSON to it over a WebSocket.

The server has no worker process and no real time: the test advances its clock tick by tick (`tests.serve.stepped`).
Called by the tests of the protocols, the transports and the web server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import aiohttp
import av
import numpy as np
from aiohttp import web

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime.pool import WorkerPool
from jaxtml.serve.runtime.scheduler import ScheduledSession, Scheduler, TextQueue
from jaxtml.serve.sessions.access import Access
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.manager import Limits, SessionManager
from jaxtml.serve.web.application import application
from jaxtml.serve.web.site import Site
from jaxtml.session.engine import Engine
from jaxtml.session.records import SlotInput
from jaxtml.session.slots import Slots
from tests.serve.stepped import InProcessWorker, SteppedClock

WAIT_S = 20.0  # a test fails if something that it waits for takes longer


@dataclass
class Serving:
    """A running server, as a test sees it.

    Attributes:
      url: the server's address.
      http: an HTTP client.
      manager: the server's session manager.
      clock: the clock of its scheduler.
      model: its worker.
      metrics: its metrics.
    """

    url: str
    http: aiohttp.ClientSession
    manager: SessionManager
    clock: SteppedClock
    model: InProcessWorker
    metrics: Metrics

    async def advance(self, ticks: int = 1) -> None:
        """Runs that many ticks."""
        await self.clock.advance(ticks)

    @asynccontextmanager
    async def ticking(self, period_s: float = 0.0) -> AsyncIterator[None]:
        """Runs tick after tick while the context is open, one every `period_s` seconds (0.2 on a real server)."""

        async def forever() -> None:
            due = time.monotonic()
            while True:
                await self.advance()
                due += period_s
                await asyncio.sleep(max(0.005, due - time.monotonic()))

        task = asyncio.create_task(forever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def session(self) -> ClientSession:
        """Returns the only session of the server."""
        (session,) = self.manager.sessions.values()
        return session

    def model_inputs(self) -> list[SlotInput]:
        """Returns the inputs that the model got, tick by tick."""
        return [input for tick in self.model.ticks for input in tick.inputs.values()]

    def counted(self, sample: str, **labels: str) -> float:
        """Returns the value of a metric; 0 if it was never counted."""
        return self.metrics.registry.get_sample_value(sample, labels) or 0.0

    async def open(self, path: str = "/v1/live/sessions", **options: Any) -> Client:
        """Returns a client with an open WebSocket and no session yet."""
        ws = await self.http.ws_connect(self.url + path, **options)
        return Client(ws)

    async def start(self, audio: dict[str, Any] | None = None, **session: Any) -> Client:
        """Returns a client whose GPT-Live session has started. The keywords go into `session.start`."""
        client = await self.open()
        pcm = {"type": "audio/pcm", "rate": 16000}
        await client.send(
            "session.start", session={"model": "small_test", "audio": {"format": audio or pcm}, **session}
        )
        client.started = (await client.until("session.started"))["session"]
        return client


class Client:
    """A client with one WebSocket.

    Attributes:
      events: all events that it has read.
      started: the session in its `session.started` event.
    """

    def __init__(self, ws: aiohttp.ClientWebSocketResponse):
        self.ws = ws
        self.events: list[dict[str, Any]] = []
        self.started: dict[str, Any] = {}

    async def send(self, kind: str, **fields: Any) -> None:
        """Sends an event of type `kind`."""
        await self.ws.send_str(json.dumps({"type": kind, **fields}))

    async def event(self) -> dict[str, Any]:
        """Waits for the next event and returns it. Raises `ConnectionError` if the server has closed the connection."""
        message = await asyncio.wait_for(self.ws.receive(), WAIT_S)
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ConnectionError(f"closed with {self.ws.close_code}")
        self.events.append(json.loads(message.data))
        return self.events[-1]

    async def until(self, kind: str) -> dict[str, Any]:
        """Reads events up to the next one of type `kind`, and returns that one."""
        while (event := await self.event())["type"] != kind:
            pass
        return event

    async def closed(self) -> int:
        """Reads events until the server closes the connection, and returns the close code."""
        while True:
            try:
                await self.event()
            except ConnectionError:
                assert self.ws.close_code is not None
                return self.ws.close_code

    async def cut_off(self, session: ClientSession) -> None:
        """Loses the connection without closing it, and waits until the server has noticed."""
        connection = self.ws._response.connection
        assert connection is not None and connection.transport is not None
        connection.transport.abort()
        await eventually(lambda: not session.scheduled.attached)

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """Returns the events of type `kind` that were read so far."""
        return [event for event in self.events if event["type"] == kind]


def serving(
    slots: Slots,
    engine: Engine,
    test: Callable[[Serving], Awaitable[None]],
    access: Access | None = None,
    limits: Limits | None = None,
    site: Site | None = None,
    model: Callable[[Slots, SteppedClock], InProcessWorker] = InProcessWorker,
    aliases: tuple[str, ...] = (),
    reads_background: bool = True,
) -> None:
    """Runs `test` beside a server of the small model. Its sessions have the same seeds in each run.

    Args:
      slots: the compiled model.
      engine: its engine.
      test: gets the running server.
      access: the keys; None: no keys, so everyone may do everything.
      limits: the time limits; None: the defaults.
      site: where browsers find the server, and the other pages that may use it; None: the defaults.
      model: called with the compiled model and the clock; returns the worker.
      aliases: further names of the model.
      reads_background: whether the model is served as one that reads background text.
    """
    seeds = itertools.count(7)  # with these seeds the small model hears words and speaks

    async def main() -> None:
        clock = SteppedClock()
        worker = model(slots, clock)
        metrics = Metrics()
        pool = WorkerPool([Scheduler(worker, slots.capacity, clock, metrics.observe_tick, week_ms=lambda: 0)])
        keys = access or Access()
        serve = dataclasses.replace(engine.config.serve, background_text=reads_background)
        config = dataclasses.replace(engine.config, serve=serve)
        served_model = ServedModel(config.name, config, engine.codec, aliases)
        manager = SessionManager(pool, keys, served_model, limits or Limits(), metrics)
        runner = web.AppRunner(application(Service(manager, keys, served_model, metrics), site), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        running = asyncio.create_task(pool.run())
        clock.running.append(running)
        try:
            await clock.advance(0)
            async with aiohttp.ClientSession() as http:
                url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                await test(Serving(url, http, manager, clock, worker, metrics))
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await runner.cleanup()

    with mock.patch.object(secrets, "randbits", lambda bits: next(seeds)):
        asyncio.run(main())


def jpeg(shade: int) -> bytes:
    """Returns a JPEG of one shade of grey, 20 x 30 pixels."""
    picture = io.BytesIO()
    with av.open(picture, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1, width=20, height=30, pix_fmt="yuvj420p")
        frame = av.VideoFrame.from_ndarray(np.full((30, 20, 3), shade, np.uint8), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    return picture.getvalue()


def unread(session: ScheduledSession) -> list[int]:
    """Returns the tokens of the text that waits for its micro-turns."""
    return [token for piece in session.text_queue for token in piece.tokens]


def forget_text(session: ScheduledSession) -> None:
    """Drops the text that waits for its micro-turns."""
    session.typed, session.other = TextQueue(), TextQueue()


async def eventually(condition: Callable[[], object]) -> None:
    """Waits until the condition is true."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)
