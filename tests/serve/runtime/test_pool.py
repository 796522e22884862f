"""Tests of the worker pool: which worker gets a new session, and what happens when a worker is gone."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest

from jaxtml.errors import InputError
from jaxtml.serve.runtime.pool import start_pool
from jaxtml.serve.runtime.scheduler import EndReason, ServerFull


def test_sessions_go_to_the_emptiest_worker_and_end_with_it(short_checkpoint):
    async def main() -> None:
        async with start_pool(short_checkpoint, 3, 2) as (pool, ready):
            assert [scheduler.capacity for scheduler in pool.schedulers] == [2, 1] and pool.capacity == 3
            assert '"name": "small_test"' in ready.config
            running = asyncio.create_task(pool.run())
            sessions = [pool.admit(seed) for seed in range(3)]
            assert [len(scheduler.sessions) for scheduler in pool.schedulers] == [2, 1]
            assert sorted(map(id, pool.sessions)) == sorted(map(id, sessions))
            with pytest.raises(ServerFull):
                pool.admit(3)
            for session in sessions:
                assert (await session.results_after(-1))[0].number == 0
            sessions[2].end(EndReason.ASKED)
            await asyncio.sleep(0.5)
            pool.admit(4)
            os.kill(pool.schedulers[1].model.process.pid, signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
            with pytest.raises(ConnectionError, match="the model's process is gone"):
                await running

    asyncio.run(main())


def test_two_groups_of_sessions_of_one_worker_tick_half_a_tick_apart(short_checkpoint):
    tick_ends: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with start_pool(short_checkpoint, 7, 1, lambda *_: tick_ends.append(loop.time())) as (pool, ready):
            assert (
                ready.groups == 2
                and [scheduler.capacity for scheduler in pool.schedulers] == [4, 3]
                and len(pool.workers) == 1
            )
            running = asyncio.create_task(pool.run())
            first, second = pool.admit(0), pool.admit(0)
            assert [len(scheduler.sessions) for scheduler in pool.schedulers] == [1, 1]
            for session in (first, second):
                assert (await session.results_after(4))[0].number == 5
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    gaps_s = np.diff(tick_ends)
    assert len(tick_ends) > 9 and 0.05 < np.median(gaps_s) < 0.15, "half a tick"


@pytest.mark.parametrize("workers", [0, 2, 10_000])
def test_more_workers_than_sessions_or_none_are_refused(short_checkpoint, workers):
    async def main() -> None:
        async with start_pool(short_checkpoint, 1, workers):
            pass

    with pytest.raises(InputError, match=f"{workers} workers for 1 sessions"):
        asyncio.run(main())


def test_wrong_checkpoint_is_refused_and_leaves_no_worker(tmp_path):
    async def main() -> None:
        async with start_pool(tmp_path, 2, min(2, len(os.sched_getaffinity(0)))):
            pass

    with pytest.raises(InputError, match="so it is no checkpoint: it is empty"):
        asyncio.run(main())
