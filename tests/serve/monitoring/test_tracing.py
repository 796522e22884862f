"""Tests of traces: a session is a span with events. Without OpenTelemetry nothing is recorded."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxtml.serve.monitoring import tracing
from tests.serve.serving import serving


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    """Returns the exporter that gets all spans of this test process."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # OpenTelemetry allows this once per process
    return exporter


def test_session_is_a_span_with_its_events(slots, engine, exported):
    async def test(server):
        client = await server.start()
        await server.advance(2)
        await client.cut_off(server.session())
        again = await server.open()
        started = client.started
        resume = {"session_id": started["id"], "resume_token": started["resume"]["token"], "after": 1}
        await again.send("session.resume", **resume)
        await again.until("session.resumed")
        await again.send("session.close")
        async with server.ticking():
            await again.until("session.closed")
        (span,) = exported.get_finished_spans()
        assert span.name == "chat small_test" and span.attributes is not None
        assert span.attributes["gen_ai.conversation.id"] == started["id"]
        assert span.attributes["jaxtml.end"] == "close_requested" and span.attributes["jaxtml.micro_turns"] >= 2
        assert [event.name for event in span.events] == ["client gone", "client back"]
        assert started["resume"]["token"] not in span.to_json()

    serving(slots, engine, test)


def test_without_opentelemetry_a_span_records_nothing(monkeypatch):
    monkeypatch.setattr(tracing, "trace", None)
    span = tracing.start_session_span("sess_1", "live", "small_test", "everyone")
    span.add_event("client gone")
    span.set_attribute("jaxtml.end", "expired")
    span.end()
    assert not hasattr(span, "get_span_context")
