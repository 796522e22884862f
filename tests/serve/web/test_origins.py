"""Which pages may use a server: origins as RFC 6454 compares them, names, proxies, prefixes; what a refusal says."""

from __future__ import annotations

import aiohttp
import pytest

from jaxtml.errors import InputError
from jaxtml.serve.sessions.access import Access, Key
from jaxtml.serve.web.origins import Host, Origin
from jaxtml.serve.web.site import Site
from tests.serve.serving import Serving, eventually, serving
from tests.serve.stepped import scripted

KEY = "sk-first-key"
KEYS = {"Authorization": f"Bearer {KEY}"}


def keyed() -> Access:
    return Access([Key(name="one", key=KEY)])


async def status(serving: Serving, **headers: str) -> tuple[int, str]:
    """Asks for a WebSocket with these headers. Returns the status of the answer, and the message of a refusal."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        ws = await serving.http.ws_connect(f"{serving.url}/v1/live/sessions", headers=names)
    except aiohttp.WSServerHandshakeError as refused:
        async with serving.http.options(f"{serving.url}/v1/live/sessions", headers=names) as asked:
            assert asked.status == refused.status, "a page can ask why: it cannot read the answer to its WebSocket"
            return refused.status, (await asked.json())["error"]["message"]
    await ws.close()
    return 101, ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://App.Example", "https://app.example:443/"),
        ("http://app.example.", "HTTP://app.example:80"),
        ("http://[0:0::1]:8080", "http://[::1]:8080"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_origins_that_a_browser_takes_for_the_same_are_equal(one, other):
    assert Origin.parse(one) == Origin.parse(other)
    assert Origin.parse(str(Origin.parse(one))) == Origin.parse(one)


def test_origins_that_differ_in_scheme_host_or_port_are_not_equal():
    texts = ("http://a.example", "https://a.example", "https://a.example:8443", "https://b.a.example")
    assert len({Origin.parse(text) for text in texts}) == 4


@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.2", "[::1]", "localhost", "LOCALHOST.", "a.localhost"])
def test_every_name_of_the_loopback_interface_is_known(name):
    assert Host.parse(f"{name}:8080").is_loopback and Host.parse(name).is_certain


@pytest.mark.parametrize("name", ["localhost.example", "127.0.0.1.example", "notlocalhost", "talk.example"])
def test_name_that_someone_else_may_own_is_not_certain(name):
    assert not Host.parse(name).is_loopback and not Host.parse(name).is_certain


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"origins": ["app.example"]}, "has no scheme"),
        ({"origins": ["https://app.example/talk"]}, "more than a host and a port"),
        ({"origins": ["https://*.app.example"]}, "or give * for all"),
        ({"origins": ["https://a.example,https://b.example"]}, "repeat the option"),
        ({"origins": ["http://app.example:99999"]}, "Port out of range"),
        ({"origins": ["wss://app.example"]}, "http or https"),
        ({"proxies": ["nginx"]}, "--trust-proxy nginx: give the IP address"),
        ({"prefix": "talk"}, "--path-prefix talk: give a path"),
        ({"prefix": "/talk?x"}, "--path-prefix /talk?x: give a path"),
    ],
)
def test_options_that_name_no_origin_proxy_or_path_are_refused_at_the_start(options, says):
    with pytest.raises(InputError) as error:
        Site.read(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_server_with_keys_takes_its_page_for_its_own_behind_proxies(slots, engine, caplog):
    caplog.set_level("INFO", logger="absl")

    async def test(serving: Serving) -> None:
        for host, origin in (
            ("talk.example:443", "https://talk.example"),
            ("talk.example:80", "http://talk.example"),
            ("Talk.Example", "https://talk.example"),
            ("talk.example.", "https://talk.example:443"),
        ):
            assert await status(serving, Host=host, Origin=origin, **KEYS) == (101, "")
        rewritten = {"Host": "127.0.0.1:8080", "Origin": "https://talk.example", **KEYS}
        assert (await status(serving, **rewritten, Sec_Fetch_Site="same-origin"))[0] == 101, "the browser compared them"
        code, message = await status(serving, **rewritten)
        assert code == 403 and "--allow-origin https://talk.example" in message and "127.0.0.1:8080" in message
        forged = {"X_Forwarded_Host": "talk.example", "X_Forwarded_Proto": "https"}
        assert (await status(serving, **rewritten, **forged))[0] == 403, "no proxy is trusted"
        assert (await status(serving, Host="talk.example", Origin="https://talk.example:3001", **KEYS))[0] == 403
        assert (await status(serving, Host="talk.example", Origin="nonsense", **KEYS))[0] == 400

    serving(slots, engine, test, access=keyed())
    assert "origin_not_allowed" in caplog.text and "upgrade=True" in caplog.text and KEY not in caplog.text


def test_server_without_keys_takes_only_pages_under_names_that_nobody_else_can_own(slots, engine):
    async def test(serving: Serving) -> None:
        port = serving.url.rpartition(":")[2]
        for name in ("127.0.0.1", "127.0.0.2", "localhost", "localhost.", "[::1]"):
            assert await status(serving, Host=f"{name}:{port}", Origin=f"http://{name}:{port}") == (101, "")
        for more in ({}, {"Sec_Fetch_Site": "same-origin"}):
            code, message = await status(serving, Host="rebound.example", Origin="http://rebound.example", **more)
            assert code == 403 and "--allow-origin http://rebound.example" in message and "--keys" in message
        code, message = await status(serving, Origin="null")
        assert code == 403 and "--allow-origin null" in message

    serving(slots, engine, test)


@pytest.mark.parametrize("given", ["https://Talk.Example/", "https://talk.example:443", "*"])
def test_allowed_origin_is_compared_as_browsers_compare(slots, engine, given):
    async def test(serving: Serving) -> None:
        assert (await status(serving, Origin="https://talk.example"))[0] == 101
        assert (await status(serving, Origin="http://talk.example"))[0] == (101 if given == "*" else 403)
        assert (await status(serving, Origin="null"))[0] == (101 if given == "*" else 403)

    serving(slots, engine, test, site=Site.read([given]))


def test_headers_of_a_trusted_proxy_say_where_the_page_is(slots, engine):
    async def test(serving: Serving) -> None:
        mine = {"Host": "127.0.0.1:8080", "Origin": "https://talk.example:3001", **KEYS}
        for headers in (
            {"X_Forwarded_Host": "talk.example:3001", "X_Forwarded_Proto": "https"},
            {"X_Forwarded_Host": "talk.example", "X_Forwarded_Port": "3001"},
            {"X_Forwarded_Host": "talk.example:3001, inner.example", "X_Forwarded_Proto": "https, http"},
            {"Forwarded": 'for=192.0.2.7;host="talk.example:3001";proto=https, for=192.0.2.8;host=inner.example'},
        ):
            assert await status(serving, **mine, **headers) == (101, ""), headers
        wrong = {"X_Forwarded_Host": "talk.example:3001", "X_Forwarded_Proto": "http"}
        assert (await status(serving, **mine, **wrong))[0] == 403, "http and https are two origins"
        assert (await status(serving, **mine, X_Forwarded_Host="a b"))[0] == 400

    serving(slots, engine, test, access=keyed(), site=Site.read(proxies=["127.0.0.0/8"]))


def test_foreign_page_may_load_the_static_files_and_nothing_else(slots, engine):
    async def test(serving: Serving) -> None:
        strange = {"Origin": "https://talk.example", "Host": "rebound.example"}
        for path in ("/", "/index.html", "/page.js", "/demo.flac"):
            async with serving.http.get(serving.url + path, headers=strange) as answer:
                assert answer.status == 200 and "Access-Control-Allow-Origin" not in answer.headers
        for path in ("/v1/models", "/metrics", "/v1/models/page.js"):
            async with serving.http.get(serving.url + path, headers=strange) as refused:
                assert refused.status == 403
        async with serving.http.post(serving.url + "/", headers=strange) as refused:
            assert refused.status == 403

    serving(slots, engine, test)


def test_server_has_its_addresses_under_a_prefix_too(slots, engine):
    async def test(serving: Serving) -> None:
        for path in ("/talk/", "/talk/page.js", "/talk/health", "/talk/v1/models", "/health", "/"):
            async with serving.http.get(serving.url + path) as answer:
                assert answer.status == 200, path
        async with serving.http.get(serving.url + "/talk?x=1", allow_redirects=False) as moved:
            assert moved.status == 308 and moved.headers["Location"] == "/talk/?x=1"
        strange = {"Origin": "https://other.example"}
        async with serving.http.get(serving.url + "/talk/page.js", headers=strange) as answer:
            assert answer.status == 200
        ws = await serving.http.ws_connect(f"{serving.url}/talk/v1/realtime")
        assert (await ws.receive_json())["type"] == "session.created"
        await ws.close()
        await serving.advance()
        await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, site=Site.read(prefix="/talk/"), model=scripted({}))


def test_prefix_that_a_trusted_proxy_removed_comes_back_in_redirects(slots, engine):
    async def test(serving: Serving) -> None:
        headers = {"X-Forwarded-Prefix": "/outer"}
        async with serving.http.get(f"{serving.url}/talk", headers=headers, allow_redirects=False) as moved:
            assert moved.headers["Location"] == "/outer/talk/"
        async with serving.http.get(f"{serving.url}/health", headers={"X-Forwarded-Prefix": "//e.example"}) as answer:
            assert answer.status == 200

    serving(slots, engine, test, site=Site.read(proxies=["127.0.0.1"], prefix="/talk"))


def test_preflight_allows_the_headers_that_it_asks_for_on_allowed_origins(slots, engine):
    async def test(serving: Serving) -> None:
        asked = "authorization,x-stainless-os,x-openai-agents-sdk"
        headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
        for path in ("/v1/models", "/v1/realtime/client_secrets", "/v1/realtime/calls"):
            allowed = headers | {"Origin": "https://page.example"}
            async with serving.http.options(serving.url + path, headers=allowed) as answer:
                assert answer.status == 204 and answer.headers["Access-Control-Allow-Headers"] == asked
                assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
                assert "Access-Control-Request-Headers" in answer.headers["Vary"]
        secrets = f"{serving.url}/v1/realtime/client_secrets?api-version=1"
        async with serving.http.post(secrets, headers={"Origin": "https://page.example"}) as answer:
            exposed = answer.headers["Access-Control-Expose-Headers"]
            assert {"Jaxtml-No-Effect", "Retry-After"} <= set(
                exposed.split(", ")
            ) and "Jaxtml-No-Effect" in answer.headers
        async with serving.http.options(serving.url, headers=headers | {"Origin": "https://evil.example"}) as refused:
            assert refused.status == 403 and "Access-Control-Allow-Headers" not in refused.headers

    serving(slots, engine, test, site=Site.read(["https://page.example"]))
