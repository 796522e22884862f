"""Traces of sessions, where OpenTelemetry is installed (extra `telemetry`): a span for each, with what happened in it.

Only its API is called: who wants traces starts the server with `opentelemetry-instrument jaxtml serve ...`, which says
where they go; without it nothing is recorded. A span begins inside the request that asks for the session, so that it
is a child of the caller's where HTTP requests are traced; the spans of those have addresses, in which there may be keys
of Moshi's clients and tokens of Realtime's. Names of attributes are those of OpenTelemetry's conventions for generative
AI where there are any. Called by `serve.sessions.manager`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

try:
    from opentelemetry import trace
except ImportError:
    trace = None

Value = str | int | float | bool


class Span(Protocol):
    """What is used of `opentelemetry.trace.Span`."""

    def set_attribute(self, key: str, value: Value) -> None: ...

    def add_event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None: ...

    def end(self) -> None: ...


class _Nothing:
    def set_attribute(self, key: str, value: Value) -> None:
        del key, value

    def add_event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        del name, attributes

    def end(self) -> None:
        pass


def start_session_span(name: str, protocol: str, model: str, key: str) -> Span:
    """The span of a session that begins now; whoever has it ends it."""
    if trace is None:
        return _Nothing()
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "jaxtml",
        "gen_ai.request.model": model,
        "gen_ai.conversation.id": name,
        "jaxtml.protocol": protocol,
        "jaxtml.key": key,
    }
    return trace.get_tracer("jaxtml").start_span(f"chat {model}", kind=trace.SpanKind.SERVER, attributes=attributes)
