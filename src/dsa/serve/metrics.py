"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dsa.serve.engine import Engine
from dsa.serve.job import Done

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The figures of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("dsa_requests", "Requests", ["path", "status"], registry=registry)
        self._seconds = Histogram("dsa_request_seconds", "Of a request", ["path"], buckets=SECONDS, registry=registry)
        self._first = Histogram(
            "dsa_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self._tokens = Counter(
            "dsa_tokens", "Tokens read, not read again (held), and written", ["what"], registry=registry
        )
        for name, help_text in (
            ("waiting", "Requests that wait"),
            ("running", "Requests that are worked on"),
            ("sessions", "Caches in memory"),
            ("tokens", "Tokens in the caches in memory"),
        ):
            gauge = Gauge(f"dsa_engine_{name}", help_text, registry=registry)
            gauge.set_function(lambda name=name: engine.figures()[name])  # type: ignore[misc]

    def finished(self, path: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answered(self, done: Done) -> None:
        """A request has been answered."""
        for what, count in (("read", done.read - done.held), ("held", done.held), ("written", done.written)):
            self._tokens.labels(what).inc(count)
        if done.first_token_s is not None:
            self._first.observe(done.first_token_s)

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)
