"""GPT-Live with clients that send too much, too fast or nothing, and with clients that read nothing."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest

from jaxtml.serve.protocols.live import routes
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.manager import Limits
from jaxtml.serve.transport import connection
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from tests.serve.protocols.live.test_live import as_base64
from tests.serve.serving import Client, Serving, eventually, serving


def test_connection_without_a_valid_first_message_is_closed(slots, engine):
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


def test_connections_that_have_not_begun_a_session_are_bounded_and_later_ones_wait(slots, engine, monkeypatch):
    monkeypatch.setattr(routes, "_OPENING", 2)

    async def test(serving: Serving) -> None:
        silent = [await serving.open() for _ in range(2)]
        waiting = asyncio.create_task(serving.start())
        await asyncio.sleep(0.2)
        assert not waiting.done() and not serving.manager.sessions
        await silent[0].ws.close()
        later = [await waiting, await serving.start(), await serving.start()]
        assert len(serving.manager.sessions) == 3, "a session that has begun holds no place"
        assert not silent[1].ws.closed and all(not client.ws.closed for client in later)

    serving(slots, engine, test)


def test_client_that_finds_no_place_to_open_a_connection_is_refused(slots, engine, monkeypatch):
    monkeypatch.setattr(routes, "_OPENING", 0)

    async def test(serving: Serving) -> None:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await serving.open()
        assert refused.value.status == 503 and refused.value.headers is not None
        assert refused.value.headers["Retry-After"] == "1"

    serving(slots, engine, test, limits=Limits(first_message_s=0.2))


def test_sound_without_room_waits_in_the_network(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session, chunk = serving.session(), as_base64(bytes(2 * MICRO_TURN_SAMPLES))
        sending = asyncio.create_task(_flood(client, chunk, 120))  # 24 seconds of sound
        await eventually(lambda: not session.scheduled.jitter_buffer.free_samples())
        await asyncio.sleep(0.3)
        assert (
            session.scheduled.jitter_buffer.waiting_samples == 160_000
            and len(session.protocol.intake._overflow) <= MICRO_TURN_SAMPLES
        )
        async with serving.ticking():
            await eventually(
                lambda: sending.done() and session.protocol.intake.received_bytes == 120 * 2 * MICRO_TURN_SAMPLES
            )
        assert session.scheduled.jitter_buffer.missed_samples == 0, (
            "the model hears all of it, one micro-turn after the other"
        )

    serving(slots, engine, test)


def test_sound_that_waits_for_room_is_not_taken_from_a_replaced_connection(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session, chunk = serving.session(), as_base64(bytes(4 * 16_000))
        intake = session.protocol.intake
        for _ in range(6):  # two seconds each; the session has room for five of them
            await client.send("session.input_audio.append", audio=chunk)
        await eventually(lambda: intake.received_bytes == 6 * 64_000)
        client = await _reconnect(serving, client)
        await client.send("session.input_audio.append", audio=chunk)  # waits for room, and is not counted as received
        await asyncio.sleep(0.2)
        session.connection.replace()  # as a resume does, before the server tells the client how much has arrived
        intake.clear()
        session.micro_turn_done.set()  # in the same moment the session gets room
        await eventually(lambda: session.connection is None)
        assert intake.received_bytes == 6 * 64_000 and await client.closed() == 1008

    serving(slots, engine, test)


async def _reconnect(serving: Serving, client: Client) -> Client:
    """Cuts a client off, and returns a client that resumes its session over another connection."""
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
    monkeypatch.setattr(connection, "_MESSAGES_BURST", 10)
    monkeypatch.setattr(connection, "_MESSAGES_PER_SECOND", 100)

    async def test(serving: Serving) -> None:
        client = await serving.start()
        began = time.monotonic()
        for _ in range(60):
            await client.ws.send_str("nonsense")
        for _ in range(60):
            await client.until("error")
        assert time.monotonic() - began > 0.3

    serving(slots, engine, test)


def test_client_that_reads_nothing_loses_its_session(slots, engine, monkeypatch):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        session.replay_buffer.max_bytes = 100_000
        client.ws._response.connection.transport.pause_reading()
        for _ in range(100):  # more than all buffers between server and client hold
            session.replay_buffer.append(bytes(90_000))
            await asyncio.sleep(0)
        await eventually(lambda: session.scheduled.end_reason)
        assert session.scheduled.end_reason is EndReason.SLOW
        other = await serving.start()
        await serving.advance()
        await other.until("session.output_audio.delta")

    serving(slots, engine, test)


def test_limits_stop_a_client_that_tries_to_use_up_memory_or_time(slots, engine, monkeypatch):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        await client.send("session.input_text.append", content="a", event_id="e" * 600)
        assert (await client.until("error"))["error"]["param"] == "event_id"
        for n in range(4200):
            await client.send("session.input_text.append", content="a", event_id=str(n))
        error = (await client.until("error"))["error"]
        assert error["code"] == "rate_limit_exceeded" and len(session.scheduled.text_queue) == 4096
        assert session.scheduled.typed.tokens == sum(len(piece.tokens) for piece in session.scheduled.text_queue)
        began = time.monotonic()
        await client.send("session.commentary.append", content="x" * 900_000, delegation_id=None)
        while (await client.until("error"))["error"]["code"] != "string_above_max_length":
            pass
        assert time.monotonic() - began < 2, "a long text is refused by its size, before it is tokenised"
        chunk = as_base64(bytes(4 * 16_000))
        for _ in range(3):  # over connections that are lost
            for _ in range(4):  # two seconds each
                await client.send("session.input_audio.append", audio=chunk)
            await asyncio.sleep(0.2)
            client = await _reconnect(serving, client)
        intake = session.protocol.intake
        assert len(intake._overflow) <= 2 * 16_000, "at most one message waits outside the jitter buffer"
        assert intake.received_bytes == 2 * (session.scheduled.jitter_buffer.waiting_samples + len(intake._overflow)), (
            "everything that is reported as received is kept"
        )
        beside = [await serving.open(f"/v1/live/sessions/{session.id}/attach") for _ in range(4)]
        async with serving.http.get(f"{serving.url}/v1/live/sessions/{session.id}/attach") as refused:
            assert refused.status == 429
        for one in beside:
            await one.ws.close()

    monkeypatch.setattr(connection, "_MESSAGES_PER_SECOND", 100_000)
    monkeypatch.setattr(connection, "_MESSAGES_BURST", 100_000)
    serving(slots, engine, test)
