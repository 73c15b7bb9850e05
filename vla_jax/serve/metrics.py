"""What the server counts, in Prometheus' text format. Touched from the event loop only."""

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Histogram:
    """How often values fell at or below each bound."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        # The last one counts what lies above every bound.
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self._counts)

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Samples of a metric of this name."""
        lines, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            # Prometheus' buckets are cumulative.
            total += count
            label = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f'{name}_bucket{{le="{label}"}} {total}')
        return [*lines, f"{name}_sum {self._sum!r}", f"{name}_count {total}"]


@dataclass
class Metrics:
    """The server's counts since it started.

    Attributes:
        requests: answered with actions, by the wire's name, see `transports`.
        errors: refused, by reason: malformed (not a message), observation (not one the policy
            takes), policy (it failed), unauthorized, full (no session or connection left),
            too_large, timeout (never completed), shutdown (not answered before the end).
        batch_size: sessions in one pass of the policy.
        request_seconds: from the arrival of a whole request to its actions, waiting included.
        infer_seconds: of one pass of the policy.
    """

    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    batch_size: Histogram = field(default_factory=lambda: Histogram(_SIZES))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    infer_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))

    def render(self, gauges: Mapping[str, int]) -> str:
        """One page.

        Args:
            gauges: what is counted elsewhere, as there is of it now: sessions, connections, queue.
        """
        lines = []
        for name, label, counts, text in (
            ("requests", "transport", self.requests, "requests answered with actions"),
            ("errors", "reason", self.errors, "requests and connections refused"),
        ):
            lines += [f"# HELP vla_{name}_total {text}", f"# TYPE vla_{name}_total counter"]
            lines += [f'vla_{name}_total{{{label}="{k}"}} {n}' for k, n in sorted(counts.items())]
        for name, histogram, text in (
            ("batch_size", self.batch_size, "sessions in one pass of the policy"),
            ("request_seconds", self.request_seconds, "from a whole request to its actions"),
            ("infer_seconds", self.infer_seconds, "one pass of the policy"),
        ):
            lines += [f"# HELP vla_{name} {text}", f"# TYPE vla_{name} histogram"]
            lines += histogram.lines(f"vla_{name}")
        for name, value in gauges.items():
            lines += [f"# HELP vla_{name} now", f"# TYPE vla_{name} gauge", f"vla_{name} {value}"]
        return "\n".join(lines) + "\n"
