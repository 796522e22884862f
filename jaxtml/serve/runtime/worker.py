"""The worker process, which holds the model and does nothing but run ticks.

`jaxtml serve` starts it as `python -m jaxtml.serve.runtime.worker` (`serve.runtime.worker_process`) and passes one end
of a socket as a file descriptor. The worker ends when a message over that socket asks it to end, or when the other end
of the socket is closed. A tick is one step of the model for all sessions of a group
(`jaxtml.session.slots.slot_groups`). Ticks must end in time. So transport, codecs and JSON run in another process, the
network process: in this one they would delay ticks. If a model lies on several hosts, each host has a worker; see
`serve.runtime.hosts`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
from absl import logging

from jaxtml.config import to_json
from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.processes import join_processes
from jaxtml.serve.runtime import hosts
from jaxtml.serve.runtime.wire import Tick, TickReply, WorkerReady, decode, encode, receive_data
from jaxtml.session.engine import Engine
from jaxtml.session.slots import Slots, slot_groups

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def serve_ticks(
    connection: socket.socket, groups: Sequence[Slots], on_tick: Callable[[bytes], None] = lambda data: None
) -> bool:
    """Sends `WorkerReady` and then answers ticks.

    Args:
      connection: the socket to the network process.
      groups: the slots of each group of sessions.
      on_tick: called with each encoded tick before the tick runs.

    Returns:
      True when the network process asked the worker to end; False when it has closed the connection.
    """
    compilations = 0

    def count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compilations
        del duration_secs
        compilations += event == _COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    connection.sendall(encode(WorkerReady(to_json(groups[0].engine.config), len(groups))))
    while data := receive_data(connection):
        on_tick(data)
        tick = decode(data)
        assert isinstance(tick, Tick)
        reply = run_tick(groups[tick.group], tick)
        connection.sendall(encode(dataclasses.replace(reply, compilations=compilations)))
        compilations = 0
    return data is not None


def run_tick(slots: Slots, tick: Tick) -> TickReply:
    """Runs one tick of a group: ends sessions, begins sessions, then runs one micro-turn of all in `tick.inputs`."""
    started_at = time.perf_counter()
    for session in tick.end:
        slots.end(session)
    for start in tick.begin:
        slots.begin(start.session, start.seed, start.week_ms)
    outputs = slots.step(tick.inputs)
    return TickReply(outputs, 1000 * (time.perf_counter() - started_at))


def follow_leader(checkpoint: str | Path, drains: Collection[signal.Signals]) -> None:
    """Runs the worker of a follower host: repeats the leader's ticks until the leader ends.

    The process ends with status 2 and a message if it cannot run the model, and with status 1 if the leader is gone.

    Args:
      checkpoint: directory of the model.
      drains: signals at which this process asks the leader to drain.

    Raises:
      InputError: the leader cannot be reached.
    """
    # Libraries print to stdout, and callers parse the server's stdout as JSON.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    join_processes()
    setup, ticks = hosts.join_leader(drains)
    try:
        groups = _load_groups(checkpoint, setup["capacity"], MeshShape(**setup["mesh"]))
        for data in ticks:
            tick = decode(data)
            assert isinstance(tick, Tick)
            run_tick(groups[tick.group], tick)
    except (InputError, OSError) as error:
        print(f"jaxtml serve: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # a normal exit would wait for the leader, and the leader waits for this process
    except Exception:
        logging.exception("the model failed")
        hosts.exit_now("this host's process ends")


def _load_groups(checkpoint: str | Path, capacity: int, mesh: MeshShape) -> list[Slots]:
    """Loads and compiles the model and returns the slots of each group."""
    groups = slot_groups(Engine.load(checkpoint, mesh), capacity)
    gc.collect()
    gc.freeze()  # garbage collections in service then skip everything that was loaded, and ticks stay short
    return groups


def _ignore_signals() -> None:
    """Ignores SIGINT, SIGTERM and SIGHUP.

    A terminal or a supervisor signals all processes. The server then drains, and needs this process until the end.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def main() -> None:
    """Parses the command line and runs the worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="directory of the model")
    parser.add_argument("--capacity", type=int, required=True, help="number of sessions to have room for")
    parser.add_argument("--descriptor", type=int, required=True, help="file descriptor of the socket to the server")
    parser.add_argument("--mesh", default="", help="mesh of all devices that share the model, for example expert=8")
    parser.add_argument(
        "--core", type=int, help="CPU core to stay on: small matrix products are slower on two cores than on one"
    )
    args = parser.parse_args()
    _ignore_signals()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})  # must come before JAX counts the cores to size its thread pools
    leader = None
    with socket.socket(fileno=args.descriptor) as connection:
        try:
            join_processes()
            mesh = MeshShape.parse(args.mesh) if args.mesh else MeshShape()
            if jax.process_count() > 1:
                leader = hosts.start_leader({"capacity": args.capacity, "mesh": mesh.sizes})
            groups = _load_groups(args.checkpoint, args.capacity, mesh)
        except (InputError, OSError) as error:
            connection.sendall(encode(WorkerReady(error=str(error))))
            return
        if leader is None:
            serve_ticks(connection, groups)
            return
        try:
            if not serve_ticks(connection, groups, leader.broadcast):
                hosts.exit_now("the server's process is gone")
            leader.end()
        except Exception:
            logging.exception("the model failed")
            hosts.exit_now("this host's process ends")


if __name__ == "__main__":
    main()
