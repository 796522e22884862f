"""A model on several hosts: the worker of the first one tells the others what it does, and all of them do it.

A step is one program of all devices: every process has to call it, with the same inputs and in the same order. The
worker of process 0 gets ticks from the process that has the network (`serve.runtime.wire`) and passes each on, as it
came, over TCP before it runs it; the workers of the other hosts run it too and keep what it gives to themselves. They
learn where the first one is over the devices, once, and with it a secret without which nobody is told anything.

A process that is told to end (by SIGTERM or SIGINT) tells the first one, whose server drains. One that is gone takes
all others with it, at once: a step would wait for it for ever. Whoever started them starts them again. Called by
`serve.runtime.worker`.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental.multihost_utils import broadcast_one_to_all

from jaxtml.errors import InputError
from jaxtml.parallel.processes import first_host
from jaxtml.serve.runtime.wire import END, LENGTH, exactly, received

_WORD = 512  # bytes in which the first process says where it is
_FIND_S, _SHOW_S = 60.0, 5.0  # until the others have found it, and have shown the secret
DRAIN = signal.SIGUSR1  # to the server: another host is to end, however often that is said


class Leader:
    """The other hosts, seen from the first one. Use `lead`."""

    def __init__(self, others: list[socket.socket]):
        self.others, self.ending, self.server = others, False, os.getppid()
        for other in others:
            threading.Thread(target=self._watch, args=(other,), daemon=True).start()

    def tell(self, data: bytes) -> None:
        """What all are to do next."""
        for other in self.others:
            other.sendall(LENGTH.pack(len(data)) + data)

    def end(self) -> None:
        """All are done."""
        self.ending = True
        for other in self.others:
            other.sendall(END)

    def _watch(self, other: socket.socket) -> None:
        """One that is told to end says so; one that is gone is read as an end."""
        try:
            while other.recv(1):
                if os.getppid() == self.server:  # else it is gone
                    os.kill(self.server, DRAIN)
        except OSError as error:
            logging.error("another host: %s", error)
        if not self.ending:
            give_up("a process of another host is gone")


def lead(word: dict[str, Any]) -> Leader:
    """On process 0: tells all others a `word` (what JSON can carry), and waits until they have found this one.

    Raises:
      InputError: somebody does not come.
    """
    host, secret = first_host(), secrets.token_bytes(32)
    with _listening(host) as listener:
        told = json.dumps([word, host, listener.getsockname()[1], secret.hex()]).encode()
        assert len(told) <= _WORD, "names of hosts have 253 characters at most"
        broadcast_one_to_all(np.frombuffer(told.ljust(_WORD), np.uint8))
        listener.settimeout(_FIND_S)
        others: list[socket.socket] = []
        while len(others) < jax.process_count() - 1:
            try:
                other, _ = listener.accept()
            except TimeoutError as error:
                raise InputError(f"only {len(others) + 1} of {jax.process_count()} hosts are there") from error
            other.settimeout(_SHOW_S)
            if _shows(other, secret):
                _watched(other)
                others.append(other)
            else:
                other.close()
    return Leader(others)


def _listening(host: str) -> socket.socket:
    """On the loopback where that is what the host is called by, else wherever the others may come from."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _watched(connection: socket.socket) -> None:
    """A machine that is gone says nothing more: then the connection ends after some seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("NODELAY", 1), ("KEEPIDLE", 5), ("KEEPINTVL", 2), ("KEEPCNT", 3), ("USER_TIMEOUT", 10_000)):
        if hasattr(socket, f"TCP_{option}"):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)


def _shows(other: socket.socket, secret: bytes) -> bool:
    try:
        return hmac.compare_digest(exactly(other, len(secret)) or b"", secret)
    except OSError:
        return False


def follow() -> tuple[dict[str, Any], Iterator[bytes]]:
    """On any other process: the first one's word, and what it tells, one after the other, until the end.

    Raises:
      InputError: the first one cannot be reached.
    """
    word, host, port, secret = json.loads(bytes(broadcast_one_to_all(np.zeros(_WORD, np.uint8))))
    try:
        first = socket.create_connection((host, port), _FIND_S)
        first.sendall(bytes.fromhex(secret))
        _watched(first)
    except OSError as error:
        raise InputError(f"the first host cannot be reached as {host}:{port}: {error}") from error
    told: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(first, told.put), daemon=True).start()

    def leave(*_: object) -> None:
        with suppress(OSError):  # it is gone, which `_listen` sees too
            first.send(b"\0")

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, leave)
    return word, iter(told.get, b"")


def _listen(first: socket.socket, put: Callable[[bytes], None]) -> None:
    """In a thread: while a step waits for the first host, nobody else would see that it is gone."""
    data: bytes | None = None
    while data != b"":
        try:
            data = received(first)
        except OSError as error:
            logging.error("the first host: %s", error)
            data = None
        if data is None:
            give_up("the first host's process is gone")
        else:
            put(data)


def give_up(why: str) -> NoReturn:
    """Ends this process at once: in good order it would wait for the others, or it waits inside a step already."""
    logging.error("%s", why)
    logging.flush()
    os._exit(1)
