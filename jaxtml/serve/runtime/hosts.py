"""A model on several hosts: one worker, the leader, sends every tick to the workers of the other hosts.

Called by `serve.runtime.worker`. A tick (`serve.runtime.wire.Tick`) is the request for one step of the model. Before
changing this file, know that a step is one program on all devices: every process must run it with the same inputs, in
the same order. A process that stops running steps blocks all the others.

The worker of process 0 is the leader. The network process, which serves the clients, sends ticks to the leader. The
leader passes each tick on, unchanged, over TCP before it runs the tick. The other workers are followers: they run the
same tick and keep the results to themselves. Followers learn the leader's address once, through a broadcast over the
devices, together with a secret. The leader sends ticks only to connections that show the secret.

- A follower that gets SIGTERM or SIGINT tells the leader, and the leader's server drains. `serve.signals` says when
  SIGHUP does the same.
- A process that dies takes all others with it at once, because a step would wait for it forever. A supervisor must
  start them again.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import NoReturn, TypedDict

import jax
import numpy as np
from absl import logging
from jax.experimental.multihost_utils import broadcast_one_to_all

from jaxtml.errors import InputError
from jaxtml.parallel.processes import first_host
from jaxtml.serve.runtime.wire import END_FRAME, LENGTH, receive_data, receive_exactly
from jaxtml.strict_json import dumps

_INVITATION_BYTES = 512  # size of the broadcast that tells followers where the leader is
_CONNECT_S = 60.0  # within this time all followers must have connected
_SECRET_S = 5.0  # within this time a new connection must show the secret
# Tells the server to drain because a follower asks for it. Sending this signal again does no harm.
DRAIN_SIGNAL = signal.SIGUSR1


class Setup(TypedDict):
    """What a follower must know to load the same model as the leader, see `serve.runtime.worker`.

    Attributes:
      capacity: number of sessions to have room for.
      mesh: sizes of the axes of the mesh, as `MeshShape` takes them.
    """

    capacity: int
    mesh: dict[str, int]


class Leader:
    """The leader's side of the connections to its followers. `start_leader` creates a `Leader`.

    Args:
      followers: one connection per follower.
    """

    def __init__(self, followers: list[socket.socket]):
        self.followers, self.ending, self.server_pid = followers, False, os.getppid()
        for follower in followers:
            threading.Thread(target=self._watch, args=(follower,), daemon=True).start()

    def broadcast(self, data: bytes) -> None:
        """Sends a tick to all followers: its length, then `data`, which is the encoded tick."""
        for follower in self.followers:
            follower.sendall(LENGTH.pack(len(data)) + data)

    def end(self) -> None:
        """Tells all followers to finish."""
        self.ending = True
        for follower in self.followers:
            follower.sendall(END_FRAME)

    def _watch(self, follower: socket.socket) -> None:
        """Waits, in a thread, for news of a follower.

        A byte means that the follower asks the server to drain. A closed connection means that the follower is gone.
        """
        try:
            while follower.recv(1):
                if os.getppid() == self.server_pid:  # another parent means that the server itself is gone
                    os.kill(self.server_pid, DRAIN_SIGNAL)
        except OSError as error:
            logging.error("the connection to a process of another host failed: %s", error)
        if not self.ending:
            exit_now("a process of another host is gone")


def start_leader(setup: Setup) -> Leader:
    """Called on process 0: tells all followers the leader's address, and waits until they have connected.

    The broadcast is `_INVITATION_BYTES` long. It carries `setup`, the leader's host name and port, and the secret.

    Args:
      setup: at most 150 characters as JSON. This leaves room in the broadcast for the longest host name that is
        allowed, 253 characters.

    Raises:
      InputError: a follower does not connect in time.
    """
    host, secret = first_host(), secrets.token_bytes(32)
    with _listen(host) as listener:
        invitation = dumps([setup, host, listener.getsockname()[1], secret.hex()]).encode()
        assert len(invitation) <= _INVITATION_BYTES, "the invitation is too long for the broadcast"
        broadcast_one_to_all(np.frombuffer(invitation.ljust(_INVITATION_BYTES), np.uint8))
        listener.settimeout(_CONNECT_S)
        followers: list[socket.socket] = []
        while len(followers) < jax.process_count() - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise InputError(f"only {len(followers) + 1} of {jax.process_count()} hosts have connected") from error
            connection.settimeout(_SECRET_S)
            if _shows_secret(connection, secret):
                _detect_dead_peer(connection)
                followers.append(connection)
            else:
                connection.close()
    return Leader(followers)


def join_leader(drains: Collection[signal.Signals]) -> tuple[Setup, Iterator[bytes]]:
    """Called on any other process: connects to the leader and returns its `setup` and an iterator over its ticks.

    The ticks are encoded, without their length. The iterator ends when the leader ends.

    Args:
      drains: signals at which this process asks the leader to drain.

    Raises:
      InputError: the leader cannot be reached.
    """
    invitation = broadcast_one_to_all(np.zeros(_INVITATION_BYTES, np.uint8))
    setup, host, port, secret = json.loads(bytes(invitation))
    try:
        leader = socket.create_connection((host, port), _CONNECT_S)
        leader.sendall(bytes.fromhex(secret))
        _detect_dead_peer(leader)
    except OSError as error:
        raise InputError(f"the first host cannot be reached as {host}:{port}: {error}") from error
    ticks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive_ticks, args=(leader, ticks.put), daemon=True).start()

    def ask_to_drain(*_: object) -> None:
        with suppress(OSError):  # if the leader is gone, `_receive_ticks` notices too
            leader.send(b"\0")

    for name in drains:
        signal.signal(name, ask_to_drain)
    return setup, iter(ticks.get, b"")


def exit_now(reason: str) -> NoReturn:
    """Logs the reason and ends this process at once with status 1.

    A normal exit would wait for the other processes, and the main thread may be blocked inside a step.
    """
    logging.error("%s", reason)
    logging.flush()
    os._exit(1)


def _receive_ticks(leader: socket.socket, put: Callable[[bytes], None]) -> None:
    """Receives the leader's ticks and calls `put` with each one. Ends this process if the leader is gone.

    Runs in a thread, because the main thread cannot notice a dead leader while a step blocks it.
    """
    data: bytes | None = None
    while data != b"":
        try:
            data = receive_data(leader)
        except OSError as error:
            logging.error("the connection to the first host's process failed: %s", error)
            data = None
        if data is None:
            exit_now("the first host's process is gone")
        else:
            put(data)


def _listen(host: str) -> socket.socket:
    """Listens on the loopback interface if `host` names this interface, else on all interfaces, IPv4 and IPv6."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _detect_dead_peer(connection: socket.socket) -> None:
    """Sets keep-alive so that the connection ends within about ten seconds if the other machine dies silently."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("NODELAY", 1), ("KEEPIDLE", 5), ("KEEPINTVL", 2), ("KEEPCNT", 3), ("USER_TIMEOUT", 10_000)):
        if hasattr(socket, f"TCP_{option}"):  # not on every operating system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)


def _shows_secret(connection: socket.socket, secret: bytes) -> bool:
    try:
        return hmac.compare_digest(receive_exactly(connection, len(secret)) or b"", secret)
    except OSError:
        return False
