"""What each end of a WebSocket means for its session, code by code, as docs/serving.md states it."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import ssl
from pathlib import Path

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from jaxtml.serve.protocols import service
from jaxtml.serve.runtime.scheduler import AWAY_S, EndReason
from jaxtml.serve.serving import ServerOptions
from jaxtml.serve.sessions import manager
from jaxtml.serve.sessions.access import Access, Key
from jaxtml.serve.sessions.manager import Limits
from jaxtml.serve.transport import connection, endings
from jaxtml.serve.transport.endings import AWAY_CODE, ConnectionEnd
from tests.serve.serving import Client, Serving, eventually, serving
from tests.serve.stepped import scripted
from tests.serve.test_credentials import make_certificate

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


def stated(by_server: bool) -> list[tuple[int, str]]:
    """Returns `(close code, effect on the session)` from docs/serving.md, for the server's closings or all others."""
    section = PAGE.read_text().split("## How a session ends\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d, ]+) \| (.+?) \|$", section, re.MULTILINE)
    return [
        (int(code), session)
        for what, codes, session in rows
        for code in codes.split(", ")
        if ("server closes" in what) == by_server
    ]


async def close(client: Client, code: int) -> None:
    """Ends a client's connection with a close code. 1005: a Close frame without a code. 1006: no Close frame."""
    if code == endings.NO_CLOSE_FRAME:
        client.ws._response.connection.transport.abort()
        return
    body = b"" if code == endings.NO_CODE else code.to_bytes(2, "big")
    await client.ws._writer.send_frame(body, aiohttp.WSMsgType.CLOSE)


def test_document_states_the_table_of_the_code():
    limits, by_client = Limits(), dict(stated(by_server=False))
    means = {
        ConnectionEnd.LEFT: "ends at once",
        ConnectionEnd.AWAY: f"waits {AWAY_S:.0f} s",
        ConnectionEnd.GONE: f"waits {limits.grace_s:.0f} s",
    }
    assert by_client == {code: means[endings.client_closed(code)] for code in by_client}
    assert set(endings._CLIENT_CODES) | {1000, 1001, 1005} == set(by_client), "every code has its row"
    by_server = [(code, "ends at once") for code in (*endings.INVALID_CODES, 1008)]
    assert stated(by_server=True) == [*by_server, (1008, "goes on")]


def test_document_states_the_other_reasons_and_limits_of_the_code():
    section = PAGE.read_text().split("## How a session ends\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+)` \| (\d+|none) \|$", section, re.MULTILINE)
    by_server = (EndReason.ASKED, EndReason.EXPIRED, EndReason.DRAINED, EndReason.FAILED)
    codes = {reason: str(service._CLOSE_CODES[reason]) for reason in by_server}
    codes[EndReason.GONE] = "none"  # the session has no connection that could be closed
    assert {EndReason(reason): code for _, _, reason, code in rows} == codes
    limits, text = Limits(), " ".join(what + what_then for what, what_then, _, _ in rows)
    for stated_limit in (
        f"in {limits.closing_s:.0f} s at most",
        f"`--session-minutes` ({limits.session_s / 60:.0f})",
        f"told {manager._WARNING_S:.0f} s before",
        f"`--drain-seconds` ({ServerOptions('').drain_s:.0f})",
    ):
        assert stated_limit in text


@pytest.mark.parametrize("path", ["/v1/live/sessions", "/v1/realtime"])
def test_every_close_code_of_a_client_has_the_stated_effect(slots, engine, path):
    expected = dict(stated(by_server=False))
    expected |= dict.fromkeys((1002, 1003, 1007, 1008, 1009, 1010, 3000, 4000, 4999), "ends at once")

    async def test(serving: Serving) -> None:
        for code, effect in expected.items():
            client = await (serving.open(path) if "realtime" in path else serving.start())
            session = serving.session()
            await close(client, code)
            if effect == "ends at once":
                await eventually(lambda session=session: session.scheduled.end_reason)
                assert session.scheduled.end_reason is EndReason.LEFT, code
            else:
                await eventually(lambda session=session: not session.scheduled.attached)
                assert not session.scheduled.end_reason and session.scheduled.away == (code == AWAY_CODE), code
                assert f"waits {session.scheduled.waits_until - serving.clock.time:.0f} s" == effect, code
            session.scheduled.end(EndReason.ASKED)
            await serving.advance()
            await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, model=scripted({}))


@pytest.mark.parametrize("messages", [1, 400])
def test_client_that_closes_behind_a_minute_of_unheard_sound_ends_its_session(slots, engine, messages):
    """Its Close frame comes after sound for which the session has no room yet."""
    sound = base64.b64encode(bytes(60 * 32_000 // messages)).decode()

    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        for _ in range(messages):
            await client.send("session.input_audio.append", audio=sound)
        await client.ws._writer.send_frame(b"", aiohttp.WSMsgType.CLOSE)
        await eventually(lambda: session.scheduled.end_reason)
        assert session.scheduled.end_reason is EndReason.LEFT

    serving(slots, engine, test, model=scripted({}))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x83\x80\0\0\0\0", 1002),  # a reserved opcode
        (b"\x88\x83\0\0\0\0\x03\xe8\xff", 1007),  # a Close frame whose reason is no UTF-8
        (b"\x82\xff" + (connection.MESSAGE_BYTES + 1).to_bytes(8, "big") + bytes(4), 1009),
    ],
)
def test_message_that_cannot_be_read_ends_the_session_and_is_logged(slots, engine, data, code, caplog):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        client.ws._response.connection.transport.write(data + bytes(connection.MESSAGE_BYTES * (code == 1009)))
        assert await client.closed() == code
        await eventually(lambda: session.scheduled.end_reason is EndReason.INVALID)
        await serving.advance()
        assert serving.manager.pool.taken == 0

    serving(slots, engine, test, model=scripted({}))
    assert "cannot be read" in caplog.text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("endless", [False, True])
def test_client_that_does_not_confirm_its_end_over_tls_is_cut_off(tmp_path, monkeypatch, endless):
    """Either its message never ends, or it does not answer the server's Close frame."""
    monkeypatch.setattr(connection, "MESSAGE_BYTES", 2**12)
    monkeypatch.setattr(connection, "_REST_S", 0.1)
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT_S", 0.1)
    certificate, key = make_certificate(tmp_path, "localhost")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    closed: list[int | None] = []

    async def answer(request: web.Request) -> web.WebSocketResponse:
        ws = connection.new_websocket()
        await ws.prepare(request)
        transport = connection.WebSocketTransport(request, ws, WSMsgType.TEXT)
        while await transport.receive():
            if not endless:
                break
        await transport.close(transport.close_code or 1000, "")
        closed.append(transport.close_code)
        return ws

    async def test() -> None:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        async with aiohttp.ClientSession() as http:
            ws = await http.ws_connect(f"https://127.0.0.1:{runner.addresses[0][1]}/", ssl=False)
            await ws.send_str("x")
            if endless:
                assert ws._response.connection is not None and ws._response.connection.transport is not None
                ws._response.connection.transport.write(b"\x02\x80" + bytes(4) + (b"\0\x80" + bytes(4)) * 2**11)
                await ws.receive()  # the server's Close frame; the client then closes its side
            await eventually(lambda: closed)
        await runner.cleanup()

    asyncio.run(test())
    assert closed == [1009 if endless else None]


def test_client_that_was_away_takes_its_session_back(slots, engine):
    async def test(serving: Serving) -> None:
        first = await serving.start()
        session = serving.session()
        await close(first, AWAY_CODE)
        await eventually(lambda: session.scheduled.away)
        async with serving.http.get(f"{serving.url}/ready") as ready:
            assert (await ready.json())["sessions"] == 0, "the session is in nobody's way"
        back = await serving.open()
        resume = {"session_id": session.id, "resume_token": first.started["resume"]["token"], "after": 1}
        await back.send("session.resume", **resume)
        await back.until("session.resumed")
        await eventually(lambda: session.scheduled.attached)
        async with serving.http.get(f"{serving.url}/ready") as ready:
            assert (await ready.json())["sessions"] == 1
        await serving.advance()
        await back.until("session.output_audio.delta")

    serving(slots, engine, test, model=scripted({}))


def test_pages_that_are_opened_again_and_again_lock_nobody_out(slots, engine):
    """One key with one session, and a server with four: neither is used up by pages that announced their absence."""
    access = Access([Key(name="one", key="sk-first-key", sessions=1), Key(name="two", key="sk-second-key")])

    async def test(serving: Serving) -> None:
        for key in ("sk-first-key", "sk-second-key"):
            for _ in range(6):
                client = await serving.open("/v1/realtime", headers={"Authorization": f"Bearer {key}"})
                await client.until("session.created")
                session = next(one for one in serving.manager.sessions.values() if one.connection is not None)
                await close(client, AWAY_CODE)
                await eventually(lambda session=session: session.scheduled.away)
        assert sum(one.grant.key.name == "one" for one in serving.manager.sessions.values()) <= 1
        await serving.advance(60)
        await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, access=access, model=scripted({}))


def test_client_that_is_away_loses_its_session_to_a_new_one_only(slots, engine):
    """A request that begins no session ends none."""
    key = {"Authorization": "Bearer sk-first-key"}
    access = Access([Key(name="one", key="sk-first-key", sessions=1, scopes=("realtime", "live"))])

    async def test(serving: Serving) -> None:
        client = await serving.open("/v1/realtime", headers=key)
        await client.until("session.created")
        session = serving.session()
        await close(client, AWAY_CODE)
        await eventually(lambda: session.scheduled.away)
        async with serving.http.post(f"{serving.url}/v1/live/sessions", headers=key, data="{}") as refused:
            assert refused.status == 400
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await serving.http.ws_connect(f"{serving.url}/api/chat", headers=key)
        assert refused.value.status == 403 and not session.scheduled.end_reason
        client = await serving.open("/v1/realtime", headers=key)
        await client.until("session.created")
        assert session.scheduled.end_reason is EndReason.GONE

    serving(slots, engine, test, access=access, model=scripted({}))
