"""The signals of a server: SIGTERM and SIGINT drain it, SIGHUP reads its keys and its certificate again.

| signal | what the server does |
|---|---|
| SIGTERM, SIGINT | drains: takes no new sessions, and ends when its sessions have ended |
| a second SIGTERM or SIGINT | ends at once |
| SIGHUP | reads the files of `--keys`, `--tls-cert` and `--tls-key` again; without such files it drains |
| SIGHUP because its terminal was closed | drains; after `nohup` the server goes on |

Called by `serve.serving`. On the other hosts of a pod, `serve.runtime.hosts` asks the first host to drain at the
signals that `follower_drains` returns.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from absl import logging

from jaxtml.errors import InputError
from jaxtml.serve.monitoring import log
from jaxtml.serve.runtime import hosts


class ServerSignals:
    """Listens to signals from now on, in the running event loop.

    Args:
      reload: reads the files again and raises `InputError` if one cannot be used; None: there are no files.

    Attributes:
      drain: set when the server shall end as soon as its sessions have ended.
      now: set when the server shall end at once.
    """

    def __init__(self, reload: Callable[[], None] | None):
        self.drain, self.now = asyncio.Event(), asyncio.Event()
        self._reload, self._signalled = reload, False
        self._ignores_hangup = ignores_hangup()
        self._had_terminal = _has_terminal()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._on_end)
        loop.add_signal_handler(hosts.DRAIN_SIGNAL, self.drain.set)
        if reload is not None or not self._ignores_hangup:
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_end(self) -> None:
        if self._signalled:
            self.now.set()
        self.drain.set()
        self._signalled = True

    def _on_hangup(self) -> None:
        terminal_closed = self._had_terminal and not _has_terminal()
        if self._reload is None or (terminal_closed and not self._ignores_hangup):
            self.drain.set()
        elif not terminal_closed:
            try:
                self._reload()
                log.event("read the keys and the certificate again")
            except InputError as error:
                logging.error("the old keys and the old certificate stay in force: %s", error)


def follower_drains(has_files: bool) -> tuple[signal.Signals, ...]:
    """Returns the signals at which a process on another host asks the first host to drain.

    If SIGHUP is not one of them, this process ignores SIGHUP from now on.

    Args:
      has_files: the first host reads files again at SIGHUP. A supervisor may send SIGHUP to all hosts.
    """
    if not has_files and not ignores_hangup():
        return signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return signal.SIGTERM, signal.SIGINT


def ignores_hangup() -> bool:
    """Returns whether this process ignores SIGHUP, as after `nohup`."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def _has_terminal() -> bool:
    """Returns whether this process has a controlling terminal. It loses its terminal when that is closed."""
    try:
        os.close(os.open(os.ctermid(), os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
