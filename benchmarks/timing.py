"""Timing of calls, as the benchmarks of kernels share it."""

from __future__ import annotations

import time
from collections.abc import Callable

Call = Callable[[], object]


def seconds(call: Call, at_least: float = 0.05) -> float:
    """Time enough calls to fill `at_least` seconds; return the seconds of one."""
    started = time.perf_counter()
    num_calls = 0
    while not num_calls or time.perf_counter() - started < at_least:
        call()
        num_calls += 1
    return (time.perf_counter() - started) / num_calls
