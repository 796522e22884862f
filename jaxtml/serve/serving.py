"""`jaxtml serve`: the workers, the addresses, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import logging as standard
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging
from aiohttp import web

from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.config import from_json
from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.processes import process_rank
from jaxtml.serve.monitoring import log
from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.registry import PROTOCOLS
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime import hosts, worker
from jaxtml.serve.runtime.pool import WorkerPool, start_pool
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Access
from jaxtml.serve.sessions.client_session import ServedModel
from jaxtml.serve.sessions.manager import Limits, SessionManager
from jaxtml.serve.web.application import application
from jaxtml.stream.text import TextCodec


@dataclass(frozen=True)
class ServerOptions:
    """What `jaxtml serve` is told; see its `--help`."""

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 8080
    max_sessions: int = 8
    workers: int = 0  # as many as are good for this machine
    replica: str = ""  # this server's name among others behind the same address
    mesh: str = ""  # of the devices that share the model, as `MeshShape.parse` reads it; empty: one
    keys: Path | None = None
    origins: Sequence[str] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    limits: Limits = Limits()
    drain_s: float = 30.0
    json: bool = False
    log_json: bool = False


def serve(options: ServerOptions) -> None:
    """Serves until SIGTERM or SIGINT, then until the sessions are over, `drain_s` at most; a second one ends it now.

    Where JAX finds several processes, the first of them takes the traffic, and the others run the model with it.

    Raises:
      InputError: what is wrong with the options, the checkpoint, the keys or the certificate, or a port that is taken.
      SystemExit: with status 1, a worker is gone, or another host.
    """
    if options.log_json:
        log.use_json()
    session_prefix(options.replica)
    on_mesh = _on_mesh(options)
    if process_rank():
        log.event("runs the model with the first host", process=process_rank())
        worker.follow_leader(options.checkpoint)
        return
    access, tls = _access(options), _tls(options)
    workers = 1 if on_mesh else options.workers or min(_usual_workers(), options.max_sessions)
    jax.config.update("jax_platforms", "cpu")  # this process leaves accelerators to its workers
    try:
        with _bound(options) as place:
            asyncio.run(_serve(options, access, tls, workers, place))
    except ConnectionError as error:
        logging.error("%s: all sessions are lost", error)
        raise SystemExit(1) from error


def session_prefix(replica: str) -> str:
    """Of the names of sessions: a router finds the server of a session by it. Raises `InputError`."""
    if not re.fullmatch("[a-z0-9]{0,16}", replica):
        raise InputError(f"--replica {replica!r}: 16 small letters and digits at most")
    return f"sess_{replica}." if replica else "sess_"


def _access(options: ServerOptions) -> Access:
    if options.keys is not None:
        return Access.load(options.keys, PROTOCOLS)
    if not _is_loopback(options.host):
        raise InputError(f"--host {options.host} is seen by others: give --keys FILE, so that not everyone may use it")
    return Access()


def _tls(options: ServerOptions) -> ssl.SSLContext | None:
    if options.certificate is None:
        if options.private_key is not None:
            raise InputError("--tls-key without --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.certificate, options.private_key)
    except OSError as error:  # an ssl.SSLError too
        raise InputError(f"--tls-cert {options.certificate}: {error}") from error
    return context


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _on_mesh(options: ServerOptions) -> bool:
    """Whether one worker has several devices. Raises `InputError` where the options do not go together."""
    mesh = MeshShape.parse(options.mesh)
    if mesh.devices == 1 and process_rank() is not None:
        raise InputError("there are several processes: say with --mesh how their devices share the model")
    if mesh.devices > 1 and options.workers > 1:
        raise InputError(f"--mesh {options.mesh} is one worker's: leave --workers out")
    return mesh.devices > 1


def _usual_workers() -> int:
    """One per core where the model runs on CPUs: its products are too small for two to share."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]  # asking takes an accelerator's memory
    platform = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return len(os.sched_getaffinity(0)) if platform == "cpu" else 1


def _bound(options: ServerOptions) -> socket.socket:
    """The server's place, before the long work; nobody can connect to it yet."""
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot listen on {options.host}:{options.port}: {why}") from error
    return place


async def _serve(
    options: ServerOptions, access: Access, tls: ssl.SSLContext | None, workers: int, place: socket.socket
) -> None:
    metrics, orders = Metrics(), _Orders()
    began = time.monotonic()
    log.event("loading and compiling, which takes longer the first time", workers=workers)
    places = (options.max_sessions, workers, metrics.observe_tick, options.mesh)
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(start_pool(options.checkpoint, *places)))
        told = asyncio.create_task(orders.drain.wait())
        await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not starting.done():
            log.event("told to end before it was ready")
            starting.cancel()
            await asyncio.wait([starting])
            return
        pool, ready = starting.result()
        config = from_json(ready.config)
        served = ServedModel(config.name, config, TextCodec.load(options.checkpoint / TOKENIZER))
        manager = SessionManager(pool, access, served, options.limits, metrics, session_prefix(options.replica))
        _watched(metrics, pool, manager)
        app = application(Service(manager, access, served, metrics), options.origins)
        # aiohttp would log requests that it cannot parse with all that is in them, keys too.
        unheard = standard.getLogger("jaxtml.http")
        unheard.disabled = True
        patience = {"keepalive_timeout": options.limits.first_message_s, "shutdown_timeout": 5}
        runner = web.AppRunner(app, access_log=None, logger=unheard, handle_signals=False, **patience)
        await runner.setup()
        try:
            gc.collect()
            gc.freeze()  # all that is loaded: to look through it takes longer than there is between two ticks
            gc.collect()  # Python looks through old objects when there are a quarter more than at the last time
            await web.SockSite(runner, place, ssl_context=tls).start()
            host = f"[{options.host}]" if ":" in options.host else options.host
            url = f"{'https' if tls else 'http'}://{host}:{place.getsockname()[1]}"
            log.event("ready", after_s=round(time.monotonic() - began, 1), url=url)
            said = {"url": url, "model": served.name, "sessions": pool.capacity, "workers": workers}
            print(json.dumps(said) if options.json else f"talk to {served.name}: {url} (Ctrl-C ends it)", flush=True)
            await _until_told(orders, pool, manager, options.drain_s)
        finally:
            await runner.cleanup()


class _Orders:
    """What signals say, from now on: to `drain`, by SIGTERM, SIGINT, or another host; `now`, by another one."""

    def __init__(self) -> None:
        self.drain, self.now = asyncio.Event(), asyncio.Event()
        self._told = False
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._signalled)
        loop.add_signal_handler(hosts.DRAIN_SIGNAL, self.drain.set)

    def _signalled(self) -> None:
        if self._told:
            self.now.set()
        self.drain.set()
        self._told = True


async def _until_told(orders: _Orders, pool: WorkerPool, manager: SessionManager, drain_s: float) -> None:
    """Ticks until a signal comes and the sessions are over; raises `ConnectionError` where a worker is gone."""
    running = asyncio.create_task(pool.run())
    waiting, hurrying = asyncio.create_task(orders.drain.wait()), asyncio.create_task(orders.now.wait())
    try:
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            log.event("draining", sessions=len(manager.sessions), at_most_s=drain_s)
            draining = asyncio.create_task(manager.drain(drain_s))
            await asyncio.wait([running, draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
        await manager.end_all(EndReason.FAILED if running.done() else EndReason.DRAINED)
        if running.done():
            running.result()
    finally:
        for task in (waiting, hurrying, running):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await running


def _watched(metrics: Metrics, pool: WorkerPool, manager: SessionManager) -> None:
    """Gauges, read when they are asked for."""
    counts = [hub.counts for hub in pool.schedulers]
    watch, count = metrics.add_gauge, metrics.add_counter
    watch("duplex_sessions_active", "with a slot, clients that are gone included", lambda: len(pool.sessions))
    watch("duplex_sessions_detached", "whose client is gone", lambda: sum(not one.attached for one in pool.sessions))
    watch("duplex_sessions_capacity", "there is room for", lambda: pool.capacity)
    count("duplex_deadline_miss", "ticks that ended late", lambda: sum(one.misses for one in counts))
    count("duplex_ticks_lost", "ticks that were left out", lambda: sum(one.lost for one in counts))
    count("duplex_compilations", "since ready: a bug", lambda: sum(one.compilations for one in counts))
    watch("duplex_draining", "about to end", lambda: manager.drain_deadline is not None)
