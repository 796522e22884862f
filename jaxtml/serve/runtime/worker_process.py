"""The worker, seen from the process that has the network: started, waited for, asked tick by tick, and ended."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from jaxtml.errors import InputError
from jaxtml.serve.runtime.wire import END, LENGTH, Message, Tick, TickReply, WorkerReady, packed, unpacked

_END_S = 5.0  # until a worker that was told to end is killed
_STUCK_S = 20.0  # for the answer to a tick


class WorkerProcess:
    """A running worker, a `serve.runtime.scheduler.Model`. Use `start`.

    Attributes:
      ready: its first word.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ):
        self.process, self.reader, self.writer = process, reader, writer
        self.ready = WorkerReady()
        self._one = asyncio.Lock()

    @classmethod
    async def start(
        cls, checkpoint: str | Path, capacity: int, core: int | None = None, mesh: str = ""
    ) -> WorkerProcess:
        """Returns when everything is compiled, some ten seconds for a small model. The worker stays on `core`; None:
        goes where it likes. `mesh`, as `MeshShape.parse` reads it, is that of all devices; empty: one.

        Raises:
          InputError: what is wrong with the checkpoint, or that the worker ended without a word.
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
                stdout=sys.stderr.fileno(),  # libraries write there what is not for who reads our stdout
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        link = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            first = await link._received()
            assert isinstance(first, WorkerReady)
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await link.close()  # of several, it may wait for the others
            raise InputError(f"the model's process ended with status {process.returncode} (see its log)") from error
        if first.error:
            await link.close()
            raise InputError(first.error)
        link.ready = first
        return link

    async def tick(self, tick: Tick) -> TickReply:
        """Asks when what others have asked is answered. Raises `ConnectionError` where the worker is gone, or stuck."""
        try:
            async with asyncio.timeout(_STUCK_S), self._one:
                self.writer.write(packed(tick))
                await self.writer.drain()
                told = await self._received()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ConnectionError("the model's process is gone") from error
        except TimeoutError as error:
            raise ConnectionError(f"the model's process has not answered for {_STUCK_S:.0f} s") from error
        assert isinstance(told, TickReply)
        return told

    async def gone(self) -> None:
        """Raises `ConnectionError` when the worker is gone, also while nobody asks it anything."""
        await self.process.wait()
        raise ConnectionError("the model's process is gone")

    async def close(self) -> None:
        """Ends the worker. Nobody may be asking it anything."""
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_END_S):
                self.writer.write(END)
                self.writer.write_eof()
                while await self.reader.read(2**16):  # an answer that nobody waits for any more
                    pass
                await self.process.wait()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self.writer.close()

    async def _received(self) -> Message:
        head = await self.reader.readexactly(LENGTH.size)
        return unpacked(await self.reader.readexactly(LENGTH.unpack(head)[0]))
