"""The process that has the model, and does nothing but tick: `python -m jaxtml.serve.worker --checkpoint DIR ...`.

Started by `jaxtml serve` with one end of a socket as file descriptor; it ends when the other end is closed. Transport,
codecs and JSON live in the other process: on two cores, they would make ticks late.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import time

import jax

from jaxtml.config import to_json
from jaxtml.errors import InputError
from jaxtml.serve.engine import Engine
from jaxtml.serve.slots import Slots
from jaxtml.serve.wire import LENGTH, Message, Ready, Tick, Told, packed, unpacked

_COMPILED = "/jax/core/compile/backend_compile_duration"


def work(connection: socket.socket, slots: Slots) -> None:
    """Answers ticks until the other end is closed."""
    compilations = 0

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compilations
        del duration_secs
        compilations += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    connection.sendall(packed(Ready(to_json(slots.engine.config), slots.capacity)))
    while (tick := received(connection)) is not None:
        assert isinstance(tick, Tick)
        connection.sendall(packed(answer(slots, tick, compilations)))


def answer(slots: Slots, tick: Tick, compilations: int = 0) -> Told:
    """One tick: sessions leave, come, and all have their micro-turn."""
    began = time.perf_counter()
    for session in tick.end:
        slots.end(session)
    for one in tick.begin:
        slots.begin(one.session, one.seed, one.week_ms)
    gave = slots.step(tick.given)
    return Told(gave, 1000 * (time.perf_counter() - began), slots.bucket, compilations)


def received(connection: socket.socket) -> Message | None:
    """The next message; None where the other end is closed."""
    head = _exactly(connection, LENGTH.size)
    if head is None:
        return None
    data = _exactly(connection, LENGTH.unpack(head)[0])
    return None if data is None else unpacked(data)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--capacity", type=int, required=True)
    parser.add_argument("--descriptor", type=int, required=True, help="of the socket")
    parser.add_argument("--core", type=int, help="to stay on: small products on two cores are slower than on one")
    args = parser.parse_args()
    # A terminal, or a supervisor, signals the whole group: the server drains then, and needs this to the last.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})  # before JAX counts the cores for its threads
    with socket.socket(fileno=args.descriptor) as connection:
        try:
            slots = Slots(Engine.load(args.checkpoint), args.capacity)
        except (InputError, OSError) as error:
            connection.sendall(packed(Ready(error=str(error))))
            return
        gc.collect()
        gc.freeze()  # what is there now stays: a collection in service need not look at it
        work(connection, slots)


if __name__ == "__main__":
    main()
