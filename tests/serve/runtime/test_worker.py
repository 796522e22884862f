"""Tests of the worker process: its outputs are those of `converse`, and it ends with the server.

`jaxtml.session.converse` runs a session over a whole wave, without a server. The worker's errors must reach the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.serve.runtime.pool import WorkerPool
from jaxtml.serve.runtime.scheduler import Scheduler
from jaxtml.serve.runtime.wire import SessionStart, Tick
from jaxtml.serve.runtime.worker_process import WorkerProcess
from jaxtml.session.converse import converse
from jaxtml.session.records import SlotInput
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES


def test_worker_gives_the_outputs_of_converse_and_ends_when_asked(checkpoint, engine, wave):
    async def main() -> None:
        worker = await WorkerProcess.start(checkpoint, 1)
        assert worker.ready.groups == 1 and '"name": "small_test"' in worker.ready.config
        stream, begin = DmelStream(), (SessionStart(3, 7, 0),)
        for index, (outputs, _) in enumerate(converse(engine, [wave], seed=7)):
            stream, bins = stream.step(wave[index * MICRO_TURN_SAMPLES : (index + 1) * MICRO_TURN_SAMPLES])
            reply = await worker.tick(Tick(begin, (), {3: SlotInput(bins)}))
            begin = ()
            np.testing.assert_array_equal(reply.outputs[3].tokens, outputs.tokens[0, : outputs.count[0]])
            np.testing.assert_allclose(reply.outputs[3].wave, outputs.wave[0], atol=1e-4)
            assert reply.compilations == 0 and reply.step_ms > 0
        reply = await worker.tick(Tick((), (3,), {}))
        assert reply.outputs == {}
        cancelled = asyncio.create_task(worker.tick(Tick()))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await worker.close()
        assert worker.process.returncode == 0, "also if nobody waits for its last reply"

    asyncio.run(main())


def test_dead_worker_ends_the_ticks_and_a_worker_ends_with_its_server(short_checkpoint):
    async def main() -> None:
        worker = await WorkerProcess.start(short_checkpoint, 1)
        scheduler = Scheduler(worker, 1)
        session = scheduler.admit(0)
        running = asyncio.create_task(scheduler.run())
        await session.results_after(-1)
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="the model's process is gone"):
            await running
        await worker.close()
        idle = await WorkerProcess.start(short_checkpoint, 1)
        running = asyncio.create_task(WorkerPool([Scheduler(idle, 1)], [idle]).run())
        os.kill(idle.process.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="the model's process is gone"):
            await asyncio.wait_for(running, 20)
        await idle.close()
        orphan = await WorkerProcess.start(short_checkpoint, 1)
        orphan.writer.transport.abort()
        assert await asyncio.wait_for(orphan.process.wait(), 20) == 0

    asyncio.run(main())


def test_wrong_checkpoint_is_refused_and_leaves_no_worker(short_checkpoint, tmp_path):
    for folder, capacity, message in (
        (tmp_path, 1, "has no config.json"),
        (short_checkpoint, 0, "room for one session at least"),
    ):
        with pytest.raises(InputError, match=message):
            asyncio.run(WorkerProcess.start(folder, capacity))
    assert not subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "serve.runtime.worker"], capture_output=True
    ).stdout


def test_worker_that_hangs_is_noticed(short_checkpoint, monkeypatch):
    monkeypatch.setattr("jaxtml.serve.runtime.worker_process._STUCK_S", 1.0)

    async def main() -> None:
        worker = await WorkerProcess.start(short_checkpoint, 1)
        os.kill(worker.process.pid, signal.SIGSTOP)
        scheduler = Scheduler(worker, 1)
        scheduler.admit(0)
        with pytest.raises(ConnectionError, match="has not answered for 1 s"):
            await scheduler.run()
        os.kill(worker.process.pid, signal.SIGCONT)
        await worker.close()
        assert worker.process.returncode == 0

    asyncio.run(main())
