"""TokenHistogram: a histogram for Prometheus that takes in every token of every stream."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenHistogram(Collector):
    """Counts on one thread, in plain numbers, which costs a tenth of what prometheus_client's own histogram costs.

    Args:
        name: of the metric.
        text: what it says.
        bounds: upper bounds of the buckets, rising; the last bucket has none.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Take in a value that was seen so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """Yield the figures so far; buckets are cumulative."""
        bounds = map(floatToGoString, (*self._bounds, math.inf))
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), list(zip(bounds, accumulate(self._counts), strict=True)), sum_value=self._sum)
        yield family
