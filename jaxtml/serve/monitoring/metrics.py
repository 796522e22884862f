"""What a server counts, for Prometheus. One object per server; `text` is what `/metrics` answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_OF_A_TICK = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.3, 0.5, 1.0)


class _Counted(Collector):
    def __init__(self, name: str, about: str, value: Callable[[], float]):
        self.name, self.about, self.value = name, about, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.about, self.value())


class Metrics:
    """Counters and histograms of one server, each with its own help text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = self.registry
        self.ticks = Histogram(
            "duplex_tick_duration_seconds",
            "of a tick, from its beginning to its results",
            buckets=_OF_A_TICK,
            registry=to,
        )
        self.steps = Histogram(
            "duplex_step_duration_seconds", "of the compiled step inside a tick", buckets=_OF_A_TICK, registry=to
        )
        self.input_lag = Histogram(
            "duplex_input_lag_seconds",
            "of sound that waits at a tick's edge, per session",
            buckets=(0.0, 0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 5.0, 10.0),
            registry=to,
        )
        self.output_gap = Histogram(
            "duplex_output_gap_seconds",
            "between what a client is sent and what it is sent next",
            buckets=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0),
            registry=to,
        )
        self.sessions_begun = Counter("duplex_sessions", "begun", ["protocol"], registry=to)
        self.sessions_ended = Counter("duplex_sessions_ended", "by reason", ["reason"], registry=to)
        self.rejections = Counter("duplex_admission_rejected", "by reason", ["reason"], registry=to)
        self.resumptions = Counter(
            "duplex_resume", "of sessions by clients that were cut off, by result", ["result"], registry=to
        )
        self.malformed_messages = Counter("duplex_malformed_messages", "by protocol", ["protocol"], registry=to)
        self.delegations = Histogram(
            "duplex_delegation_duration_seconds",
            "from a delegation to its first answer",
            buckets=(0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
            registry=to,
        )

    def add_gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def add_counter(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A counter that somebody else counts, read when it is asked for."""
        self.registry.register(_Counted(name, about, value))

    def observe_tick(self, tick_s: float, step_s: float) -> None:
        """Records one tick: the seconds it took, and the seconds of the compiled step inside it."""
        self.ticks.observe(tick_s)
        self.steps.observe(step_s)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
