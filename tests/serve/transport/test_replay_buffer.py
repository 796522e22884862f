"""What was sent is there for a while, and nothing waits for a reader."""

from __future__ import annotations

import asyncio

import pytest

from jaxtml.serve.transport.replay_buffer import ReplayBuffer, ReplayLost


def test_readers_get_what_is_behind_them_and_wait_for_more():
    async def main() -> None:
        outbox = ReplayBuffer()
        for frame in (b"a", b"b", b"c"):
            outbox.append(frame)
        assert await outbox.frames_after(0) == [b"a", b"b", b"c"] and await outbox.frames_after(2) == [b"c"]
        waiting = [asyncio.create_task(outbox.frames_after(3)) for _ in range(3)]
        await asyncio.sleep(0)
        outbox.append(b"d")
        assert await asyncio.gather(*waiting) == 3 * [[b"d"]]
        ended = asyncio.create_task(outbox.wait_closed())
        last = asyncio.create_task(outbox.frames_after(4))
        await asyncio.sleep(0)
        outbox.close()
        await ended
        assert await last == [] and await outbox.frames_after(3) == [b"d"]

    asyncio.run(main())


def test_the_oldest_go_and_whoever_wants_them_is_told():
    async def main() -> None:
        outbox = ReplayBuffer(max_bytes=100)
        for n in range(50):
            outbox.append(bytes([n]) * 10)
        assert len(outbox.frames) == 10 and outbox.kept_bytes == 100 and outbox.last_number == 50
        assert (await outbox.frames_after(40))[0] == bytes([40]) * 10
        with pytest.raises(ReplayLost, match="frame 40 is no longer kept; the oldest is 41"):
            await outbox.frames_after(39)
        outbox.append(bytes(1000))
        assert await outbox.frames_after(50) == [bytes(1000)], "the newest is kept, whatever its size"

    asyncio.run(main())
