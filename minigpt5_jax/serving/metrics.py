"""Numbers of a server, in the form that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts since the start of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "minigpt5_{}".format
        self.requests = Counter(
            name("requests"), "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            name("request_seconds"),
            "Time of requests, waiting included.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.inside = Gauge(name("requests_inside"), "Requests answered or waiting.", registry=registry)
        self.given_up = Counter(
            name("given_up"), "Requests whose client left or whose time was over.", registry=registry
        )
        self.tokens = Counter(name("tokens"), "Ids written.", registry=registry)
        self.images = Counter(name("images"), "Images drawn.", registry=registry)
        self._rows = Histogram(
            name("batch_rows"), "Answers in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self._batches = Histogram(
            name("batch_seconds"), "Time of a batch.", buckets=SECONDS, registry=registry
        )

    def batch(self, rows: int, seconds: float) -> None:
        """A batch was answered."""
        self._rows.observe(rows)
        self._batches.observe(seconds)

    def text(self) -> bytes:
        """The page ``/metrics``."""
        return generate_latest(self.registry)
