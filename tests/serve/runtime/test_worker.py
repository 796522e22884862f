"""The model's own process: it gives what the model gives here, says what is wrong, and does not outlive the server."""

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


def test_it_gives_what_the_model_gives_here_and_ends_with_its_server(checkpoint, engine, wave):
    async def main() -> None:
        link = await WorkerProcess.start(checkpoint, 1)
        assert link.ready.groups == 1 and '"name": "small_test"' in link.ready.config
        stream, begin = DmelStream(), (SessionStart(3, 7, 0),)
        for turn, (outputs, _) in enumerate(converse(engine, [wave], seed=7)):
            stream, bins = stream.step(wave[turn * MICRO_TURN_SAMPLES : (turn + 1) * MICRO_TURN_SAMPLES])
            told = await link.tick(Tick(begin, (), {3: SlotInput(bins)}))
            begin = ()
            np.testing.assert_array_equal(told.outputs[3].tokens, outputs.tokens[0, : outputs.count[0]])
            np.testing.assert_allclose(told.outputs[3].wave, outputs.wave[0], atol=1e-4)
            assert told.compilations == 0 and told.step_ms > 0
        told = await link.tick(Tick((), (3,), {}))
        assert told.outputs == {}
        unheard = asyncio.create_task(link.tick(Tick()))
        await asyncio.sleep(0)
        unheard.cancel()
        await asyncio.gather(unheard, return_exceptions=True)
        await link.close()
        assert link.process.returncode == 0, "also where nobody waits for its last answer"

    asyncio.run(main())


def test_a_worker_that_dies_ends_the_ticks_and_one_whose_server_dies_ends(checkpoint):
    async def main() -> None:
        link = await WorkerProcess.start(checkpoint, 1)
        hub = Scheduler(link, 1)
        session = hub.admit(0)
        running = asyncio.create_task(hub.run())
        await session.results_after(-1)
        os.kill(link.process.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="the model's process is gone"):
            await running
        await link.close()
        idle = await WorkerProcess.start(checkpoint, 1)
        running = asyncio.create_task(WorkerPool([Scheduler(idle, 1)], [idle]).run())
        os.kill(idle.process.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="the model's process is gone"):
            await asyncio.wait_for(running, 20)
        await idle.close()
        orphan = await WorkerProcess.start(checkpoint, 1)
        orphan.writer.transport.abort()
        assert await asyncio.wait_for(orphan.process.wait(), 20) == 0

    asyncio.run(main())


def test_what_is_wrong_with_a_checkpoint_is_said_here(checkpoint, tmp_path):
    for folder, capacity, said in (
        (tmp_path, 1, "has no config.json"),
        (checkpoint, 0, "room for one session at least"),
    ):
        with pytest.raises(InputError, match=said):
            asyncio.run(WorkerProcess.start(folder, capacity))
    assert not subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "serve.worker"], capture_output=True).stdout


def test_a_worker_that_hangs_is_noticed(checkpoint, monkeypatch):
    monkeypatch.setattr("jaxtml.serve.runtime.worker_process._STUCK_S", 1.0)

    async def main() -> None:
        one = await WorkerProcess.start(checkpoint, 1)
        os.kill(one.process.pid, signal.SIGSTOP)
        hub = Scheduler(one, 1)
        hub.admit(0)
        with pytest.raises(ConnectionError, match="has not answered for 1 s"):
            await hub.run()
        os.kill(one.process.pid, signal.SIGCONT)
        await one.close()
        assert one.process.returncode == 0

    asyncio.run(main())
