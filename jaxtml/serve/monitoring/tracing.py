"""OpenTelemetry traces: one span per session, with events such as a lost client or a delegation.

A delegation is a task that the model hands over to the client.

Called by `serve.sessions.manager`. The extra `telemetry` installs OpenTelemetry. Only its API is used here. To record
traces, start the server with `opentelemetry-instrument jaxtml serve ...`. The options of `opentelemetry-instrument` say
where the traces go. Without that command nothing is recorded.

A session's span begins while the server handles the HTTP request that asks for the session. If HTTP requests are traced
too, the session's span is a child of the request's span. Where OpenTelemetry's conventions for generative AI name an
attribute, the session's span uses that name. All other attributes begin with `jaxtml.`.

Before turning on HTTP tracing, know that its spans contain request addresses. These can hold the keys of Moshi clients
and the tokens of Realtime clients.
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
    """The part of `opentelemetry.trace.Span` that the server uses."""

    def set_attribute(self, key: str, value: Value) -> None: ...

    def add_event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None: ...

    def end(self) -> None: ...


class _NullSpan:
    """The span that is used if OpenTelemetry is not installed. It records nothing."""

    def set_attribute(self, key: str, value: Value) -> None:
        del key, value

    def add_event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        del name, attributes

    def end(self) -> None:
        pass


def start_session_span(name: str, protocol: str, model: str, key: str) -> Span:
    """Starts the span of a session. The caller ends it.

    Args:
      name: the session's public name.
      protocol: the name of the session's protocol.
      model: the name of the served model.
      key: the name of the API key, never the key itself.
    """
    if trace is None:
        return _NullSpan()
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "jaxtml",
        "gen_ai.request.model": model,
        "gen_ai.conversation.id": name,
        "jaxtml.protocol": protocol,
        "jaxtml.key": key,
    }
    return trace.get_tracer("jaxtml").start_span(f"chat {model}", kind=trace.SpanKind.SERVER, attributes=attributes)
