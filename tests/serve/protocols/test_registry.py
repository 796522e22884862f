"""A protocol is one class, its routes and one line in the registry. A small protocol of this test proves it."""

from __future__ import annotations

from aiohttp import WSMsgType, web

from jaxtml.serve.protocols import registry, websocket
from jaxtml.serve.protocols.service import Service
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.transport.sound import SoundFormat
from jaxtml.stream.reading import Words
from jaxtml.stream.tokens import Control
from tests.serve.protocols import test_fields, test_fuzz, test_large_messages
from tests.serve.serving import Serving, eventually, serving, unread
from tests.serve.stepped import scripted


class TextProtocol:
    """A client sends what it types, and receives what the model says: one text frame for each micro-turn."""

    scope = "text"
    frame_kind = WSMsgType.TEXT
    resumable = False

    def __init__(self, session: ClientSession, model: ServedModel):
        self.session = session
        self.intake = Intake(session, model, SoundFormat("pcm", 16_000))

    async def receive(self, message: bytes) -> None:
        self.intake.queue_text(Control.TYPED, message.decode(), "text")

    def on_micro_turn(self, result: TickResult, words: Words) -> None:
        self.session.replay_buffer.append(words.said.encode())

    def on_unreadable(self, invalid: InvalidMessage) -> None:
        self.session.replay_buffer.append(str(invalid).encode())

    def on_expiring(self, in_s: float) -> None:
        self.session.replay_buffer.append(b"expiring")

    def on_resume(self) -> None:
        pass

    def on_end(self, reason: EndReason) -> None:
        self.session.replay_buffer.append(reason.value.encode())


def routes(service: Service) -> list[web.RouteDef]:
    async def connect(request: web.Request) -> web.StreamResponse:
        grant = service.authorise(request)
        return await websocket.run_new_session(
            service, request, grant, lambda session: TextProtocol(session, service.model), TextProtocol.scope
        )

    return [web.get("/text", connect)]


def protocols_without_tests() -> set[tuple[str, str]]:
    """Returns each protocol that a table of the tests for all protocols does not name, with the table."""
    tables = {
        "test_fields.REQUESTS": test_fields.REQUESTS,
        "test_fuzz.PROTOCOLS": test_fuzz.PROTOCOLS,
        "test_large_messages.ADDRESSES": test_large_messages.ADDRESSES,
    }
    return {(protocol, name) for name, table in tables.items() for protocol in set(registry.PROTOCOLS) ^ set(table)}


def test_every_protocol_is_in_the_tests_that_hold_for_all_protocols():
    assert not protocols_without_tests(), "the top of serve/protocols/registry.py lists the steps"
    steps = registry.__doc__ or ""
    for name in ("test_fields.py", "test_fuzz.py", "test_large_messages.py", "REQUESTS", "PROTOCOLS", "ADDRESSES"):
        assert name in steps


def test_protocol_that_the_tests_forget_is_noticed(monkeypatch):
    monkeypatch.setitem(registry.PROTOCOLS, TextProtocol.scope, routes)
    assert {protocol for protocol, _ in protocols_without_tests()} == {"text"}
    assert len(protocols_without_tests()) == 3


def test_protocol_with_a_class_and_routes_runs_after_one_line_in_the_registry(slots, engine, monkeypatch):
    monkeypatch.setitem(registry.PROTOCOLS, TextProtocol.scope, routes)

    async def test(serving: Serving) -> None:
        async with serving.http.get(f"{serving.url}/text") as refused:
            assert refused.status == 426, "a request that asks for no WebSocket is refused"
        ws = await serving.http.ws_connect(f"{serving.url}/text")
        session = serving.session()
        await ws.send_str("the sky")
        await eventually(lambda: session.scheduled.text_queue)
        assert unread(session.scheduled) == engine.codec.encode("the sky")
        await serving.advance(2)
        assert [await ws.receive_str() for _ in range(2)] == ["", " forty"]
        await serving.manager.drain(0)
        assert [await ws.receive_str() for _ in range(2)] == ["expiring", "drained"]
        await ws.receive()
        assert ws.close_code == 1012
        assert serving.counted("duplex_sessions_total", protocol="text") == 1

    serving(slots, engine, test, model=scripted({2: (Control.SAY, " forty", Control.SPEAK)}))


def test_session_that_is_not_resumable_ends_with_its_connection(slots, engine, monkeypatch):
    monkeypatch.setitem(registry.PROTOCOLS, TextProtocol.scope, routes)

    async def test(serving: Serving) -> None:
        ws = await serving.http.ws_connect(f"{serving.url}/text")
        session = serving.session()
        ws._response.connection.transport.abort()
        await eventually(lambda: session.scheduled.end_reason)
        assert session.scheduled.end_reason is EndReason.GONE

    serving(slots, engine, test, model=scripted({}))
