"""GPT-Live and clients that send too much, too fast, or nothing, and that take nothing."""

from __future__ import annotations

import asyncio
import time

from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.manager import Limits
from jaxtml.serve.transport import connection
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from tests.serve.protocols.live.test_live import text_of
from tests.serve.serving import Client, Serving, eventually, serving


def test_a_connection_that_says_nothing_or_only_nonsense_is_closed(slots, engine):
    async def test(serving: Serving) -> None:
        silent = await serving.open()
        assert (await silent.event())["error"]["code"] == "timeout" and await silent.closed() == 1008
        noisy = await serving.open()
        for _ in range(8):
            await noisy.ws.send_str("nonsense")
            assert (await noisy.event())["error"]["code"] == "invalid_json"
        assert await noisy.closed() == 1008
        assert not serving.manager.sessions

    serving(slots, engine, test, limits=Limits(first_message_s=0.5))


def test_a_message_that_is_too_large_ends_the_connection_and_not_the_session(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        await client.ws.send_bytes(b"x" * (connection.MESSAGE_BYTES + 1))
        assert await client.closed() == 1009
        await eventually(lambda: not session.scheduled.attached)
        assert not session.scheduled.end_reason

    serving(slots, engine, test)


def test_more_sound_than_there_is_room_for_waits_in_the_network(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session, chunk = serving.session(), text_of(bytes(2 * MICRO_TURN_SAMPLES))
        sending = asyncio.create_task(_flood(client, chunk, 120))  # 24 seconds
        await eventually(lambda: not session.scheduled.jitter_buffer.free_samples())
        await asyncio.sleep(0.3)
        assert (
            session.scheduled.jitter_buffer.waiting_samples == 160_000
            and len(session.protocol.intake._unheard) <= MICRO_TURN_SAMPLES
        )
        async with serving.ticking():
            await eventually(
                lambda: sending.done() and session.protocol.intake.received_bytes == 120 * 2 * MICRO_TURN_SAMPLES
            )
        assert session.scheduled.jitter_buffer.missed_samples == 0, "and all of it is heard, one after the other"

    serving(slots, engine, test)


def test_a_connection_that_was_replaced_takes_nothing_of_what_waited(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session, chunk = serving.session(), text_of(bytes(4 * 16_000))
        intake = session.protocol.intake
        for _ in range(6):  # of two seconds each; there is room for five
            await client.send("session.input_audio.append", audio=chunk)
        await eventually(lambda: intake.received_bytes == 6 * 64_000)
        client = await _back(serving, client)
        await client.send("session.input_audio.append", audio=chunk)  # waits, and is not counted
        await asyncio.sleep(0.2)
        session.connection.replace()  # which another connection does when it tells its client how much was taken
        intake.clear()
        session.micro_turn_done.set()  # in the same moment there is room
        await eventually(lambda: session.connection is None)
        assert intake.received_bytes == 6 * 64_000 and await client.closed() == 1008

    serving(slots, engine, test)


async def _back(serving: Serving, client: Client) -> Client:
    """A client that was cut off, over another connection."""
    session = serving.session()
    await client.cut_off(session)
    again = await serving.open()
    await again.send(
        "session.resume",
        session_id=session.id,
        resume_token=session.resume_token,
        after=session.replay_buffer.last_number,
    )
    await again.until("session.resumed")
    return again


async def _flood(client: Client, chunk: str, count: int) -> None:
    async def listen() -> None:
        async for _ in client.ws:
            pass

    listening = asyncio.create_task(listen())
    for _ in range(count):
        await client.send("session.input_audio.append", audio=chunk)
    listening.cancel()


def test_messages_that_come_too_fast_are_slowed_down(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_BURST", 10)
    monkeypatch.setattr(connection, "_PER_SECOND", 100)

    async def test(serving: Serving) -> None:
        client = await serving.start()
        began = time.monotonic()
        for _ in range(60):
            await client.ws.send_str("nonsense")
        for _ in range(60):
            await client.until("error")
        assert time.monotonic() - began > 0.3

    serving(slots, engine, test)


def test_a_client_that_takes_nothing_loses_its_session(slots, engine, monkeypatch):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        session.replay_buffer.max_bytes = 100_000
        client.ws._response.connection.transport.pause_reading()
        for _ in range(100):  # more than all buffers between the two hold
            session.replay_buffer.append(bytes(90_000))
            await asyncio.sleep(0)
        await eventually(lambda: session.scheduled.end_reason)
        assert session.scheduled.end_reason is EndReason.SLOW
        other = await serving.start()
        await serving.advance()
        await other.until("session.output_audio.delta")

    serving(slots, engine, test)


def test_clients_that_try_to_fill_memory_or_time_are_held_to_their_limits(slots, engine, monkeypatch):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        await client.send("session.input_text.append", content="a", event_id="e" * 600)
        assert (await client.until("error"))["error"]["param"] == "event_id"
        for n in range(4200):
            await client.send("session.input_text.append", content="a", event_id=str(n))
        error = (await client.until("error"))["error"]
        assert error["code"] == "rate_limit_exceeded" and len(session.scheduled.text_queue) == 4096
        assert session.scheduled.waiting_tokens == sum(len(piece.tokens) for piece in session.scheduled.text_queue)
        began = time.monotonic()
        await client.send("session.commentary.append", content="x" * 900_000, delegation_id=None)
        while (await client.until("error"))["error"]["code"] != "string_above_max_length":
            pass
        assert time.monotonic() - began < 2, "refused by its size, not by its tokens"
        chunk = text_of(bytes(4 * 16_000))
        for _ in range(3):  # of two seconds each, over connections that are lost
            for _ in range(4):
                await client.send("session.input_audio.append", audio=chunk)
            await asyncio.sleep(0.2)
            client = await _back(serving, client)
        intake = session.protocol.intake
        assert len(intake._unheard) <= 2 * 16_000, "one message at most is beyond the room"
        assert intake.received_bytes == 2 * (session.scheduled.jitter_buffer.waiting_samples + len(intake._unheard)), (
            "what is told as taken is there"
        )
        beside = [await serving.open(f"/v1/live/sessions/{session.id}/attach") for _ in range(4)]
        async with serving.http.get(f"{serving.url}/v1/live/sessions/{session.id}/attach") as refused:
            assert refused.status == 429
        for one in beside:
            await one.ws.close()

    monkeypatch.setattr(connection, "_PER_SECOND", 100_000)
    monkeypatch.setattr(connection, "_BURST", 100_000)
    serving(slots, engine, test)
