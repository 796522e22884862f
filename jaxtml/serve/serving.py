"""`jaxtml serve`: starts the workers and the HTTP server, runs until a signal, and drains the sessions before it ends.

Called by `jaxtml.commands.serve`. The process that runs `serve` is the network process: it never touches an
accelerator. The model runs in worker processes (`serve.runtime`). Before changing this file, know that everything that
takes long or can fail on bad input must happen before the server prints its address.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging as standard_logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging
from aiohttp import web

from jaxtml.checkpoint.tokenizer import load_tokenizer
from jaxtml.config import from_json
from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.processes import process_rank
from jaxtml.serve.credentials import Credentials
from jaxtml.serve.monitoring import log
from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime import worker
from jaxtml.serve.runtime.pool import WorkerPool, start_pool
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.client_session import ServedModel
from jaxtml.serve.sessions.manager import Limits, SessionManager
from jaxtml.serve.signals import ServerSignals, follower_drains
from jaxtml.serve.web.application import application
from jaxtml.serve.web.site import Site
from jaxtml.strict_json import dumps

_REQUESTS_END_S = 5.0  # open HTTP requests are cut off this long after the sessions have ended


@dataclass(frozen=True)
class ServerOptions:
    """The options of `jaxtml serve`."""

    checkpoint: Path
    """Directory of the model."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is the loopback interface, which is safe without keys. Any other address needs
    `keys`."""
    port: int = 8080
    """TCP port, 0 to 65535. 0 takes a free port. The default is a usual one for a service that is not public."""
    max_sessions: int = 8
    """Sessions at a time, 1 or more. The default is 8 for every model: only `jaxtml plan` reads the config's
    `serve.sessions`."""
    workers: int = 0
    """Worker processes, 0 to `max_sessions`. 0, the default, takes one per CPU core if the model runs on CPUs, else
    one."""
    replica: str = ""
    """Name of this server among several behind one router, at most 16 small letters and digits. Empty, the default, is
    for a server that stands alone."""
    mesh: str = ""
    """Mesh of the devices that share the model, as `MeshShape.parse` reads it. Empty, the default, is one device."""
    aliases: Sequence[str] = ()
    """Further names under which clients may ask for the model. The default is none."""
    keys: Path | None = None
    """File of API keys, see `serve.sessions.access`. None, the default: no keys, and everyone may do everything."""
    origins: Sequence[str] = ()
    """Origins of the web pages that may use the server besides its own page; "*" stands for all, "null" for pages from
    files. The default is none, because a page could use the server through the browser of any visitor."""
    proxies: Sequence[str] = ()
    """IP addresses or networks of reverse proxies whose `Forwarded` and `X-Forwarded-*` headers are believed. The
    default is none, because anyone can send these headers."""
    path_prefix: str = ""
    """Path under which a proxy passes requests on without removing it, for example "/talk". The default is none."""
    certificate: Path | None = None
    """TLS certificate chain, PEM. None, the default: plain HTTP, for the loopback or behind a proxy that does TLS."""
    private_key: Path | None = None
    """Private key of the certificate, PEM. None, the default: it is in the certificate's file."""
    limits: Limits = Limits()
    """Time limits of sessions and connections."""
    drain_s: float = 30.0
    """Seconds that sessions have to end after SIGTERM, 0 or more. The default is the grace period of Kubernetes."""
    json: bool = False
    """Print the server's address on stdout as one JSON object. The default is a line for people."""
    log_json: bool = False
    """Write each log entry as one JSON object. The default is a line for people."""


def serve(options: ServerOptions) -> None:
    """Serves until SIGTERM or SIGINT, then until the sessions have ended, for at most `drain_s` more seconds.

    `jaxtml.serve.signals` says what each signal does. If JAX finds several processes, the first one serves clients, and
    the others run the model with it.

    Raises:
      InputError: the options, the checkpoint, the keys or the certificate cannot be used, or the port is taken.
      SystemExit: with status 1, because a worker or another host is gone.
    """
    if options.log_json:
        log.use_json()
    session_prefix(options.replica)
    has_mesh = _has_mesh(options)
    if process_rank():
        log.event("runs the model with the first host", process=process_rank())
        has_files = options.keys is not None or options.certificate is not None
        worker.follow_leader(options.checkpoint, follower_drains(has_files))
        return
    site = Site.read(options.origins, options.proxies, options.path_prefix)
    aliases = read_aliases(options.aliases)
    _check_host(options)
    credentials = Credentials(options.keys, options.certificate, options.private_key)
    workers = 1 if has_mesh else options.workers or min(_default_workers(), options.max_sessions)
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to the workers
    try:
        with _bind(options) as listener:
            asyncio.run(_serve(options, site, aliases, credentials, workers, listener))
    except ConnectionError as error:
        logging.error("%s: all sessions are lost", error)
        raise SystemExit(1) from error


def session_prefix(replica: str) -> str:
    """Returns the beginning of the public names of a server's sessions. A router finds a session's server by it.

    Raises:
      InputError: the name of the replica has other characters than small letters and digits, or too many.
    """
    if not re.fullmatch("[a-z0-9]{0,16}", replica):
        raise InputError(f"--replica {replica!r}: use 16 small letters and digits at most")
    return f"sess_{replica}." if replica else "sess_"


def read_aliases(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the values of `--model-alias`, each once.

    Raises:
      InputError: a name has other characters than names of models have.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}", name):
            raise InputError(
                f"--model-alias {name!r}: give one name as clients send it, for example gpt-realtime; letters, digits "
                "and . _ : / @ + - are possible"
            )
    return tuple(dict.fromkeys(names))


def _check_host(options: ServerOptions) -> None:
    """Raises `InputError` if the host is not one of this machine's, or has no keys and other machines can reach it."""
    try:
        found = socket.getaddrinfo(options.host or ".", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a valid host name"
        raise InputError(f"--host {options.host!r}: {reason}; give a name or an address of this machine") from error
    addresses = {str(address[0]).partition("%")[0] for *_, address in found}
    if options.keys is None and not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise InputError(
            f"--host {options.host} can be reached by other machines: give --keys FILE, else anyone may use it"
        )


def _has_mesh(options: ServerOptions) -> bool:
    """Returns whether one worker has several devices. Raises `InputError` if the options contradict each other."""
    mesh = MeshShape.parse(options.mesh) if options.mesh else MeshShape()
    if mesh.devices == 1 and process_rank() is not None:
        raise InputError("there are several processes: say with --mesh how their devices share the model")
    if mesh.devices > 1 and options.workers > 1:
        raise InputError(f"--mesh {options.mesh} gives all devices to one worker: leave --workers out")
    return mesh.devices > 1


def _default_workers() -> int:
    """Returns the number of CPU cores if the model runs on CPUs, else 1.

    The matrix products of a small model are too small for two cores to share, so each core gets a worker. This function
    starts a short-lived process to ask JAX for the platform, because asking reserves the memory of an accelerator.
    """
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    platform = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return len(os.sched_getaffinity(0)) if platform == "cpu" else 1


def _bind(options: ServerOptions) -> socket.socket:
    """Reserves the server's port before the model is loaded. Nobody can connect to the port yet.

    Raises:
      InputError: the address or the port cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        where = f"{options.host}:{options.port}"
        raise InputError(f"cannot listen on {where}: {reason}; give another --port or --host") from error
    return listener


async def _serve(
    options: ServerOptions,
    site: Site,
    aliases: Sequence[str],
    credentials: Credentials,
    workers: int,
    listener: socket.socket,
) -> None:
    """Starts everything, tells the user where the server is, and serves until it is told to end."""
    metrics, access, tls = Metrics(), credentials.access, credentials.tls
    signals = ServerSignals(credentials.reload if credentials.has_files else None)
    started_at = time.monotonic()
    log.event("loading and compiling, which takes longer the first time", workers=workers)
    async with contextlib.AsyncExitStack() as stack:
        pool_context = start_pool(options.checkpoint, options.max_sessions, workers, metrics.observe_tick, options.mesh)
        starting = asyncio.create_task(stack.enter_async_context(pool_context))
        signalled = asyncio.create_task(signals.drain.wait())
        await asyncio.wait([starting, signalled], return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if not starting.done():
            log.event("told to end before it was ready")
            starting.cancel()
            await asyncio.wait([starting])
            return
        pool, ready = starting.result()
        config = from_json(ready.config)
        model = ServedModel(config.name, config, load_tokenizer(options.checkpoint), tuple(aliases))
        manager = SessionManager(pool, access, model, options.limits, metrics, session_prefix(options.replica))
        _add_server_metrics(metrics, pool, manager)
        runner = _runner(application(Service(manager, access, model, metrics), site), options)
        await runner.setup()
        try:
            _freeze_loaded_objects()
            await web.SockSite(runner, listener, ssl_context=tls).start()
            host = f"[{options.host}]" if ":" in options.host else options.host
            url = f"{'https' if tls else 'http'}://{host}:{listener.getsockname()[1]}"
            log.event("ready", after_s=round(time.monotonic() - started_at, 1), url=url)
            summary = {"url": url, "model": model.name, "sessions": pool.capacity, "workers": workers}
            print(dumps(summary) if options.json else f"talk to {model.name}: {url} (Ctrl-C ends it)", flush=True)
            await _run_until_shutdown(signals, pool, manager, options.drain_s)
        finally:
            await runner.cleanup()


def _runner(app: web.Application, options: ServerOptions) -> web.AppRunner:
    """Returns aiohttp's runner of the application."""
    # If aiohttp cannot parse a request, it logs the whole request, and a request may contain an API key.
    logger = standard_logging.getLogger("jaxtml.http")
    logger.disabled = True
    return web.AppRunner(
        app,
        access_log=None,
        logger=logger,
        handle_signals=False,
        keepalive_timeout=options.limits.first_message_s,
        shutdown_timeout=_REQUESTS_END_S,
    )


def _freeze_loaded_objects() -> None:
    """Takes all loaded objects out of garbage collection: to scan them takes longer than the time between ticks."""
    gc.collect()
    gc.freeze()
    # Python runs the next full collection when the number of objects has grown by a quarter since the last one. The
    # collection above counted all loaded objects. The collection below counts only the few that are not frozen. So the
    # next full collection comes early, and is short.
    gc.collect()


async def _run_until_shutdown(
    signals: ServerSignals, pool: WorkerPool, manager: SessionManager, drain_s: float
) -> None:
    """Runs the ticks until a signal comes and the sessions have ended.

    Raises:
      ConnectionError: a worker is gone.
    """
    running = asyncio.create_task(pool.run())
    drain, now = asyncio.create_task(signals.drain.wait()), asyncio.create_task(signals.now.wait())
    try:
        await asyncio.wait([running, drain], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            log.event("draining", sessions=len(manager.sessions), at_most_s=drain_s)
            draining = asyncio.create_task(manager.drain(drain_s))
            await asyncio.wait([running, draining, now], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
        await manager.end_all(EndReason.FAILED if running.done() else EndReason.DRAINED)
        if running.done():
            running.result()
    finally:
        for task in (drain, now, running):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await running


def _add_server_metrics(metrics: Metrics, pool: WorkerPool, manager: SessionManager) -> None:
    """Adds the metrics that are read from the pool and the session manager when Prometheus asks for them."""
    counts = [scheduler.counts for scheduler in pool.schedulers]
    metrics.add_gauge(
        "duplex_sessions_active",
        "Sessions that have a slot, including sessions whose client is disconnected.",
        lambda: len(pool.sessions),
    )
    metrics.add_gauge(
        "duplex_sessions_detached",
        "Sessions whose client is disconnected.",
        lambda: sum(not session.attached for session in pool.sessions),
    )
    metrics.add_gauge("duplex_sessions_capacity", "Slots for sessions.", lambda: pool.capacity)
    metrics.add_counter(
        "duplex_deadline_miss",
        "Ticks that ended after the next tick should have started.",
        lambda: sum(count.misses for count in counts),
    )
    metrics.add_counter(
        "duplex_ticks_lost",
        "Ticks that were left out because the clock was more than a second behind.",
        lambda: sum(count.lost for count in counts),
    )
    metrics.add_counter(
        "duplex_compilations",
        "Programs compiled since the server was ready. Anything but 0 is a bug.",
        lambda: sum(count.compilations for count in counts),
    )
    metrics.add_gauge(
        "duplex_draining",
        "1 while the server waits for its sessions to end, else 0.",
        lambda: manager.drain_deadline is not None,
    )
