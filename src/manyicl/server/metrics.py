"""Metrics for Prometheus, in a registry of the server's own. No label holds the name of a task or an owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """Counts requests and their time; the worker's and the prefix store's own counters join when read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "manyicl_requests", "Requests by route and status.", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "manyicl_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("manyicl_requests_in_flight", "Requests that are answered now.", registry=self.registry)
        self._rows = Counter("manyicl_rows_answered", "Rows that were answered.", registry=self.registry)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request.

        Args:
            method: Its method.
            route: Template of its path, such as ``/v1/tasks/{task}``.
            status: Status of the answer.
            seconds: Time it took.
        """
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def count_rows(self, number: int) -> None:
        """Count answered rows."""
        self._rows.inc(number)

    def add_numbers(self, prefix: str, read: Callable[[], Any], counters: Iterable[str] = ()) -> None:
        """Export the numbers of a dataclass whenever metrics are read.

        Args:
            prefix: Beginning of the names.
            read: Gives the dataclass.
            counters: Names of its fields that only rise.
        """
        self.registry.register(_Numbers(prefix, read, frozenset(counters)))

    def as_text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass(frozen=True)
class _Numbers(Collector):
    prefix: str
    read: Callable[[], Any]
    counters: frozenset[str]

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        values = self.read()
        for name in getattr(type(values), "__dataclass_fields__", ()):
            value = getattr(values, name)
            if isinstance(value, bool | int | float):
                kind = CounterMetricFamily if name in self.counters else GaugeMetricFamily
                yield kind(f"{self.prefix}_{name}", name.replace("_", " "), value=float(value))
