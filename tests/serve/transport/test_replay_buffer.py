"""Tests of the replay buffer: it keeps the newest frames, and it never waits for a reader."""

from __future__ import annotations

import asyncio

import pytest

from jaxtml.serve.transport.replay_buffer import ReplayBuffer, ReplayLost


def test_readers_get_the_frames_after_their_number_and_wait_for_more():
    async def main() -> None:
        buffer = ReplayBuffer()
        for frame in (b"a", b"b", b"c"):
            buffer.append(frame)
        assert await buffer.frames_after(0) == [b"a", b"b", b"c"] and await buffer.frames_after(2) == [b"c"]
        waiting = [asyncio.create_task(buffer.frames_after(3)) for _ in range(3)]
        await asyncio.sleep(0)
        buffer.append(b"d")
        assert await asyncio.gather(*waiting) == 3 * [[b"d"]]
        closed = asyncio.create_task(buffer.wait_closed())
        last = asyncio.create_task(buffer.frames_after(4))
        await asyncio.sleep(0)
        buffer.close()
        await closed
        assert await last == [] and await buffer.frames_after(3) == [b"d"]

    asyncio.run(main())


def test_oldest_frames_are_dropped_and_a_reader_of_them_gets_an_error():
    async def main() -> None:
        buffer = ReplayBuffer(max_bytes=100)
        for n in range(50):
            buffer.append(bytes([n]) * 10)
        assert len(buffer.frames) == 10 and buffer.kept_bytes == 100 and buffer.last_number == 50
        assert (await buffer.frames_after(40))[0] == bytes([40]) * 10
        with pytest.raises(ReplayLost, match="frame 40 is no longer kept; the oldest is 41"):
            await buffer.frames_after(39)
        buffer.append(bytes(1000))
        assert await buffer.frames_after(50) == [bytes(1000)], "the newest is kept, whatever its size"

    asyncio.run(main())
