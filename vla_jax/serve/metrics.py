"""What the server counts, in Prometheus' text format. Touched from the event loop only."""

from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

# When a counter was made is one more sample for each, and nobody looks at it.
disable_created_metrics()


class Metrics:
    """The server's counts since it started; several servers of one process keep their own.

    Attributes:
        batch_size: sessions in one pass of the policy.
        request_seconds: from the arrival of a whole request to its actions, waiting included.
        infer_seconds: of one pass of the policy.
    """

    def __init__(self) -> None:
        # The library's own registry is global, where two servers of one process would collide.
        self._registry = CollectorRegistry()

        def counter(name: str, label: str, text: str) -> Counter:
            return Counter(f"vla_{name}", text, [label], registry=self._registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"vla_{name}", text, buckets=bounds, registry=self._registry)

        self._requests = counter("requests", "transport", "requests answered with actions")
        self._errors = counter("errors", "reason", "requests and connections refused")
        self.batch_size = histogram("batch_size", "sessions in one pass of the policy", _SIZES)
        text = "from a whole request to its actions"
        self.request_seconds = histogram("request_seconds", text, _SECONDS)
        self.infer_seconds = histogram("infer_seconds", "one pass of the policy", _SECONDS)

    def answered(self, wire: str) -> None:
        """Count a request that got its actions, by its wire's name, see `transports`."""
        self._requests.labels(wire).inc()

    def refused(self, reason: str) -> None:
        """Count one that did not.

        Args:
            reason: malformed (not a message), observation (not one the policy takes), policy (it
                failed), unauthorized, full (no session or connection left), too_large, timeout
                (never completed) or shutdown (not answered before the end).
        """
        self._errors.labels(reason).inc()

    def watch(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        """Show what is counted elsewhere, as there is of it when somebody asks."""
        for name, count in gauges.items():
            # Asked when the page is made, so that nobody has to keep a number up to date.
            Gauge(f"vla_{name}", "now", registry=self._registry).set_function(count)

    def render(self) -> str:
        """One page."""
        return generate_latest(self._registry).decode()
