"""The process that has the model, and does nothing but tick: `python -m jaxtml.serve.runtime.worker --checkpoint DIR`.

Started by `jaxtml serve` with one end of a socket as file descriptor; it ends when it is told to there, or when the
other end is closed. Transport, codecs and JSON live in the other process: on two cores, they would make ticks late. Of
a model on several hosts, each has a worker, see `serve.runtime.hosts`.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import logging

from jaxtml.config import to_json
from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape
from jaxtml.parallel.processes import join_processes
from jaxtml.serve.runtime import hosts
from jaxtml.serve.runtime.wire import Tick, TickReply, WorkerReady, packed, received, unpacked
from jaxtml.session.engine import Engine
from jaxtml.session.slots import Slots, slot_groups

_COMPILED = "/jax/core/compile/backend_compile_duration"


def work(connection: socket.socket, groups: Sequence[Slots], tell: Callable[[bytes], None] = lambda tick: None) -> bool:
    """Answers ticks until it is told to end, or (false) the other end is closed; `tell` gets each before it is run."""
    compilations = 0

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compilations
        del duration_secs
        compilations += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    connection.sendall(packed(WorkerReady(to_json(groups[0].engine.config), len(groups))))
    while data := received(connection):
        tell(data)
        tick = unpacked(data)
        assert isinstance(tick, Tick)
        told = answer(groups[tick.group], tick)
        connection.sendall(packed(dataclasses.replace(told, compilations=compilations)))
        compilations = 0
    return data is not None


def answer(slots: Slots, tick: Tick) -> TickReply:
    """One tick of a group: sessions leave, come, and all have their micro-turn."""
    began = time.perf_counter()
    for session in tick.end:
        slots.end(session)
    for one in tick.begin:
        slots.begin(one.session, one.seed, one.week_ms)
    gave = slots.step(tick.inputs)
    return TickReply(gave, 1000 * (time.perf_counter() - began))


def follow(checkpoint: str | Path) -> None:
    """The worker of a host that is not the first: does what the first one does, until that ends.

    Where it cannot, it says why and ends with status 2, and where the first host's process is gone, with 1.

    Raises:
      InputError: there is no way to the others.
    """
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries write there what is not for who reads our stdout
    join_processes()
    word, ticks = hosts.follow()
    try:
        groups = _groups(checkpoint, word["capacity"], MeshShape(**word["mesh"]))
        for data in ticks:
            tick = unpacked(data)
            assert isinstance(tick, Tick)
            answer(groups[tick.group], tick)
    except (InputError, OSError) as error:
        print(f"jaxtml serve: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # in good order it would wait for the first host, which waits for this one
    except Exception:
        logging.exception("the model failed")
        hosts.give_up("this host's process ends")


def _groups(checkpoint: str | Path, capacity: int, mesh: MeshShape) -> list[Slots]:
    groups = slot_groups(Engine.load(checkpoint, mesh), capacity)
    gc.collect()
    gc.freeze()  # what is there now stays: a collection in service need not look at it
    return groups


def _ignore_signals() -> None:
    """A terminal, or a supervisor, signals all processes: the server drains then, and needs this one to the last."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--capacity", type=int, required=True)
    parser.add_argument("--descriptor", type=int, required=True, help="of the socket")
    parser.add_argument("--mesh", default="", help="of all devices that share the model, as expert=8")
    parser.add_argument("--core", type=int, help="to stay on: small products on two cores are slower than on one")
    args = parser.parse_args()
    _ignore_signals()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})  # before JAX counts the cores for its threads
    leader = None
    with socket.socket(fileno=args.descriptor) as connection:
        try:
            join_processes()
            mesh = MeshShape.parse(args.mesh)
            if jax.process_count() > 1:
                leader = hosts.lead({"capacity": args.capacity, "mesh": mesh.sizes})
            groups = _groups(args.checkpoint, args.capacity, mesh)
        except (InputError, OSError) as error:
            connection.sendall(packed(WorkerReady(error=str(error))))
            return
        if leader is None:
            work(connection, groups)
            return
        try:
            if not work(connection, groups, leader.tell):
                hosts.give_up("the server's process is gone")
            leader.end()
        except Exception:
            logging.exception("the model failed")
            hosts.give_up("this host's process ends")


if __name__ == "__main__":
    main()
