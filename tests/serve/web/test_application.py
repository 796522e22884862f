"""Who may use the addresses of a server, by key and by origin, and how long the server waits for a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import WSMsgType

from jaxtml.serve.sessions.access import Access, Key
from jaxtml.serve.sessions.manager import Limits
from jaxtml.serve.web.site import Site
from tests.serve.serving import Serving, eventually, serving
from tests.serve.stepped import scripted


def test_keys_and_origins_decide_who_may_begin_a_session(slots, engine):
    access = Access([Key(name="one", key="sk-first-key", sessions=1), Key(name="two", key="sk-second-key")])

    async def test(serving: Serving) -> None:
        live = f"{serving.url}/v1/live/sessions"
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer sk-first-key", "Origin": "https://evil.example"}, 403),
        ):
            async with serving.http.get(live, headers=headers) as refused:
                body = await refused.json()
                assert refused.status == status and body["error"]["code"]
        async with serving.http.get(f"{serving.url}/v1/models") as refused:
            assert refused.status == 401
        browser = await serving.open(protocols=("realtime", "openai-insecure-api-key.sk-first-key"))
        assert browser.ws.protocol == "realtime"
        await browser.send("session.start", session={"model": "small_test"})
        assert (await browser.event())["type"] == "session.started"
        again = await serving.open(headers={"Authorization": "Bearer sk-first-key", "Origin": "https://page.example"})
        await again.send("session.start", session={"model": "small_test"})
        assert (await again.event())["error"]["code"] == "session_limit_exceeded"
        assert await again.closed() == 1013
        (name,) = serving.manager.sessions
        other = {"Authorization": "Bearer sk-second-key"}
        async with serving.http.get(f"{live}/{name}/attach", headers=other) as refused:
            assert refused.status == 404, "for another key the session does not exist"
        async with serving.http.options(live, headers={"Origin": "https://page.example"}) as asked:
            assert asked.headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert serving.counted("duplex_admission_rejected_total", reason="session_limit_exceeded") == 1

    serving(slots, engine, test, access=access, site=Site.read(["https://page.example"]))


def test_server_without_keys_refuses_pages_under_another_name_of_this_machine(slots, engine):
    async def test(serving: Serving) -> None:
        headers = {"Host": "rebound.example", "Origin": "http://rebound.example"}
        async with serving.http.get(f"{serving.url}/v1/live/sessions", headers=headers) as refused:
            assert refused.status == 403
        own = {"Origin": serving.url}
        async with serving.http.get(f"{serving.url}/v1/models", headers=own) as allowed:
            assert allowed.status == 200

    serving(slots, engine, test)


def test_sessions_of_one_key_share_its_minutes(slots, engine):
    clock = [0.0]
    access = Access([Key(name="one", key="sk-first-key", minutes_per_day=10)], now=lambda: clock[0])

    async def test(serving: Serving) -> None:
        headers = {"Authorization": "Bearer sk-first-key"}
        clients = [await serving.open("/v1/realtime", headers=headers) for _ in range(2)]
        clock[0] = 4 * 60.0
        await serving.advance(2)
        await asyncio.sleep(0.1)
        assert len(serving.manager.sessions) == 2, "8 of the 10 minutes are used: two sessions of 4 minutes"
        clock[0] = 4.75 * 60.0
        await serving.advance(2)
        for client in clients:
            expires_at = (await client.until("session.updated"))["session"]["expires_at"]
            assert 0 <= expires_at - time.time() + 1 <= 16, "two sessions share the last half minute, so each has 15 s"
        clock[0] = 5 * 60.0
        await serving.advance(2)
        for client in clients:
            assert await client.closed() == 1000 and client.events_of("error")[0]["error"]["code"] == "session_expired"

    serving(slots, engine, test, access=access, model=scripted({}))


def test_request_whose_body_never_comes_is_refused(slots, engine):
    async def test(serving: Serving) -> None:
        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(5)

        for path in ("/v1/realtime/client_secrets", "/v1/live/sessions"):
            async with serving.http.post(serving.url + path, data=slow()) as refused:
                assert refused.status == 408 and (await refused.json())["error"]["code"] == "timeout"

    serving(slots, engine, test, limits=Limits(first_message_s=0.2))


def test_pings_are_answered_at_a_limited_rate(slots, engine):
    async def test(serving: Serving) -> None:
        flood = await serving.http.ws_connect(f"{serving.url}/v1/live/sessions", autoping=False)
        began = time.monotonic()
        for _ in range(2000):
            await flood.ping()
        client = await serving.start()
        await client.send("session.close")
        async with serving.ticking():
            await client.until("session.closed")
        answered = 0
        while (took_s := time.monotonic() - began) < 3:
            assert (await flood.receive(timeout=3)).type is WSMsgType.PONG
            answered += 1
        assert 40 <= answered <= 41 + 20 * took_s

    serving(slots, engine, test, model=scripted({}))


def test_model_answers_to_its_aliases_wherever_a_name_is_asked(slots, engine, caplog):
    caplog.set_level("INFO", logger="absl")
    fixed = "openai/gpt-realtime"

    async def test(serving: Serving) -> None:
        async with serving.http.get(f"{serving.url}/v1/models") as listed:
            models = (await listed.json())["data"]
            assert [(one["id"], one["root"]) for one in models] == [("small_test", "small_test"), (fixed, "small_test")]
        async with serving.http.get(f"{serving.url}/v1/models/{fixed}") as one:
            assert (await one.json())["id"] == fixed
        live = await serving.open()
        await live.send("session.start", session={"model": fixed})
        assert (await live.until("session.started"))["session"]["model"] == "small_test"
        realtime = await serving.open(f"/v1/realtime?model={fixed}")
        await realtime.send("session.update", session={"type": "realtime", "model": fixed})
        await realtime.until("session.updated")
        secret = {"session": {"type": "realtime", "model": fixed}}
        async with serving.http.post(f"{serving.url}/v1/realtime/client_secrets", json=secret) as made:
            value = (await made.json())["value"]
        await serving.open("/v1/realtime", headers={"Authorization": f"Bearer {value}"})
        upgrade, wrong = {"Upgrade": "websocket"}, f"{serving.url}/v1/realtime?model=gpt-4o"
        async with serving.http.get(wrong, headers=upgrade) as refused:
            message = (await refused.json())["error"]["message"]
            assert refused.status == 404 and "'gpt-4o'" in message and "--model-alias" in message
        other = await serving.open()
        await other.send("session.start", session={"model": "gpt-live"})
        assert (await other.until("error"))["error"]["code"] == "model_not_found"

    serving(slots, engine, test, model=scripted({}), aliases=(fixed,))
    logged = [line for line in caplog.text.splitlines() if "code=model_not_found" in line]
    assert len(logged) == 2 and "gpt-4o" in logged[0] and "gpt-live" in logged[1], "both refusals are in the log"


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "A" * 22 + "=="}


@pytest.mark.parametrize("path", ["/v1/live/sessions", "/v1/realtime", "/api/chat"])
def test_upgrade_that_cannot_be_made_is_refused_and_logged_with_its_reason(slots, engine, caplog, path):
    caplog.set_level("INFO", logger="absl")

    async def test(serving: Serving) -> None:
        for headers, status, reason in (
            ({}, 426, "connect with ws:// or wss://"),
            (UPGRADE | {"Sec-WebSocket-Version": "12"}, 400, "Unsupported version: 12"),
        ):
            async with serving.http.get(serving.url + path, headers=headers) as refused:
                error = (await refused.json())["error"]
                assert refused.status == status and reason in error["message"]
        await serving.advance()
        await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, model=scripted({}))
    assert "reason=Unsupported version: 12" in caplog.text
