"""What metrics say of background responses and of batches."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class BackgroundMetrics:
    """Figures of the work that no client waits for.

    Args:
        registry: of the app.

    Attributes:
        lines: of batches that have been answered, by outcome.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.lines = Counter(
            "octavo_batch_lines", "Lines of batches that were answered, by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("completed", "failed"):
            self.lines.labels(outcome)
        self._responses = Gauge(
            "octavo_background_responses", "Background responses that wait or run.", registry=registry
        )
        self._batches = Gauge("octavo_batches_open", "Batches that have not ended.", registry=registry)

    def count(self, num_responses: Callable[[], int], num_batches: Callable[[], int]) -> None:
        """Ask these for what there is now."""
        self._responses.set_function(num_responses)
        self._batches.set_function(num_batches)
