"""The server's Prometheus metrics.

A server has one `Metrics`. The scheduler, the session manager, connections and protocols record into it, and the
address `/metrics` answers with `Metrics.text`. Metric names are a contract with dashboards: do not change them.

The server has a clock with one tick every 200 ms. At each tick the scheduler calls the compiled model once: one step,
which gives each session one micro-turn, 200 ms of input and output. A delegation is a task that the model hands over to
the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_TICK_BUCKETS_S = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.3, 0.5, 1.0)


class _ComputedCounter(Collector):
    """A counter that calls a function for its value each time Prometheus reads the metric."""

    def __init__(self, name: str, help_text: str, value: Callable[[], float]):
        self.name, self.help_text, self.value = name, help_text, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.help_text, self.value())


class Metrics:
    """The counters, gauges and histograms of one server.

    Attributes:
      registry: the Prometheus registry that holds them.
      ticks: duration of a tick, from its start to its results.
      steps: time that the worker needs inside a tick: it ends and begins sessions, and runs the model's step.
      input_lag: audio that waits in a session's jitter buffer.
      output_gap: time between two writes to one client.
      sessions_begun: sessions, by protocol.
      sessions_ended: sessions, by the reason of their end.
      rejections: requests that were refused, by error code.
      resumptions: attempts to resume a session, by result.
      malformed_messages: messages that could not be used, by protocol.
      delegations: time from a delegation to the client's first answer.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        histogram = partial(Histogram, registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        self.ticks = histogram(
            "duplex_tick_duration_seconds",
            "Duration of one tick of the server's 200 ms clock, from its start to its results.",
            buckets=_TICK_BUCKETS_S,
        )
        self.steps = histogram(
            "duplex_step_duration_seconds",
            "Time that the worker needs inside a tick, most of it for the model's step.",
            buckets=_TICK_BUCKETS_S,
        )
        self.input_lag = histogram(
            "duplex_input_lag_seconds",
            "Seconds of received audio waiting in a session's jitter buffer after a tick of the server's 200 ms clock.",
            buckets=(0.0, 0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 5.0, 10.0),
        )
        self.output_gap = histogram(
            "duplex_output_gap_seconds",
            "Time between two consecutive writes to one client.",
            buckets=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0),
        )
        self.sessions_begun = counter("duplex_sessions", "Sessions begun, by protocol.", ["protocol"])
        self.sessions_ended = counter("duplex_sessions_ended", "Sessions ended, by reason.", ["reason"])
        self.rejections = counter("duplex_admission_rejected", "Requests refused, by error code.", ["reason"])
        self.resumptions = counter(
            "duplex_resume",
            "Attempts of disconnected clients to resume their session, by result.",
            ["result"],
        )
        self.malformed_messages = counter(
            "duplex_malformed_messages",
            "Client messages that could not be used, by protocol.",
            ["protocol"],
        )
        self.delegations = histogram(
            "duplex_delegation_duration_seconds",
            "Time from when the model hands a task over to the client until the first answer.",
            buckets=(0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
        )

    def add_gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Adds a gauge. `value` is called each time Prometheus reads the gauge."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def add_counter(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Adds a counter that is kept elsewhere. `value` returns the count each time Prometheus reads the counter."""
        self.registry.register(_ComputedCounter(name, help_text, value))

    def observe_tick(self, tick_s: float, step_s: float) -> None:
        """Records one tick: the seconds it took, and the seconds that the worker needed inside it."""
        self.ticks.observe(tick_s)
        self.steps.observe(step_s)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
