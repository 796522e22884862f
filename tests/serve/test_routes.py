"""Who may use the addresses of a server, by key and by the page that asks."""

from __future__ import annotations

from jaxtml.serve.access import Access, Key
from tests.serve.serving import Serving, serving


def test_keys_and_origins_decide_who_may_begin(served, engine):
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
        await browser.say("session.start", session={"model": "small_test"})
        assert (await browser.event())["type"] == "session.started"
        again = await serving.open(headers={"Authorization": "Bearer sk-first-key", "Origin": "https://page.example"})
        await again.say("session.start", session={"model": "small_test"})
        assert (await again.event())["error"]["code"] == "session_limit_exceeded"
        assert await again.closed() == 1013
        (name,) = serving.desk.calls
        other = {"Authorization": "Bearer sk-second-key"}
        async with serving.http.get(f"{live}/{name}/attach", headers=other) as refused:
            assert refused.status == 404, "another key's sessions are not even there"
        async with serving.http.options(live, headers={"Origin": "https://page.example"}) as asked:
            assert asked.headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert serving.counted("duplex_admission_rejected_total", reason="session_limit_exceeded") == 1

    serving(served, engine, test, access=access, origins=("https://page.example",))


def test_a_page_under_another_name_of_this_machine_may_not_use_a_server_without_keys(served, engine):
    async def test(serving: Serving) -> None:
        headers = {"Host": "rebound.example", "Origin": "http://rebound.example"}
        async with serving.http.get(f"{serving.url}/v1/live/sessions", headers=headers) as refused:
            assert refused.status == 403
        own = {"Origin": serving.url}
        async with serving.http.get(f"{serving.url}/v1/models", headers=own) as allowed:
            assert allowed.status == 200

    serving(served, engine, test)
