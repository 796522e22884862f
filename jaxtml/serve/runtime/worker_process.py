"""The worker process, as the network process sees it: start it, ask it for ticks, notice its death, and end it.

Called by `serve.runtime.pool`. The other side is `serve.runtime.worker`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from jaxtml.errors import InputError
from jaxtml.serve.runtime.wire import END_FRAME, LENGTH, Message, Tick, TickReply, WorkerReady, decode, encode

_END_S = 5.0  # a worker that was asked to end is killed after this time
_STUCK_S = 20.0  # a worker that has not answered a tick after this time counts as stuck


class WorkerProcess:
    """A running worker; implements `serve.runtime.scheduler.TickModel`. `start` starts one.

    Attributes:
      process: the operating system's process.
      ready: the worker's first message.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ):
        self.process, self.reader, self.writer = process, reader, writer
        self.ready = WorkerReady()
        self._one_tick_at_a_time = asyncio.Lock()

    @classmethod
    async def start(
        cls, checkpoint: str | Path, capacity: int, core: int | None = None, mesh: str = ""
    ) -> WorkerProcess:
        """Starts a worker and returns when everything is compiled, which takes about ten seconds for a small model.

        Args:
          checkpoint: directory of the model.
          capacity: number of sessions that the worker has room for.
          core: CPU core on which the worker stays; None: the operating system chooses.
          mesh: the mesh of all devices that share the model, as `MeshShape.parse` reads it; empty: one device.

        Raises:
          InputError: the checkpoint cannot be served, or the worker ended before its first message.
        """
        ours, theirs = socket.socketpair()
        command = ["-m", "jaxtml.serve.runtime.worker", "--checkpoint", str(checkpoint), "--capacity", str(capacity)]
        command += ["--mesh", mesh]
        if core is not None:
            command += ["--core", str(core)]
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                "--descriptor",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),  # libraries print to stdout, and callers parse the server's stdout as JSON
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        worker = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            ready = await worker._receive()
            assert isinstance(ready, WorkerReady)
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await worker.close()  # on a mesh of several hosts the process may still wait for the other hosts
            raise InputError(f"the model's process ended with status {process.returncode} (see its log)") from error
        if ready.error:
            await worker.close()
            raise InputError(ready.error)
        worker.ready = ready
        return worker

    async def tick(self, tick: Tick) -> TickReply:
        """Runs one tick in the worker, after the ticks that other schedulers asked for first.

        Raises:
          ConnectionError: the worker is gone or stuck.
        """
        try:
            async with asyncio.timeout(_STUCK_S), self._one_tick_at_a_time:
                self.writer.write(encode(tick))
                await self.writer.drain()
                reply = await self._receive()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ConnectionError("the model's process is gone") from error
        except TimeoutError as error:
            raise ConnectionError(f"the model's process has not answered for {_STUCK_S:.0f} s") from error
        assert isinstance(reply, TickReply)
        return reply

    async def wait_gone(self) -> None:
        """Waits until the process ends, whether a tick is running or not, and then raises `ConnectionError`."""
        await self.process.wait()
        raise ConnectionError("the model's process is gone")

    async def close(self) -> None:
        """Ends the worker. No call of `tick` may be in progress."""
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_END_S):
                self.writer.write(END_FRAME)
                self.writer.write_eof()
                while await self.reader.read(2**16):  # the reply to a cancelled call of `tick` may arrive
                    pass
                await self.process.wait()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self.writer.close()

    async def _receive(self) -> Message:
        head = await self.reader.readexactly(LENGTH.size)
        return decode(await self.reader.readexactly(LENGTH.unpack(head)[0]))
