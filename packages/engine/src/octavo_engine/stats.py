"""Collects an engine's figures out of its scheduler, for metrics and reports."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from octavo_engine.adapters.info import AdapterStats
from octavo_engine.api import EngineStats
from octavo_engine.expert_stats import ExpertStats
from octavo_engine.overlap import OverlapStats
from octavo_engine.preemption import PreemptionStats
from octavo_engine.scheduler import Scheduler


def collect_stats(
    scheduler: Scheduler,
    adapters: AdapterStats | None = None,
    overlap: OverlapStats | None = None,
    experts: ExpertStats | None = None,
) -> EngineStats:
    """Return the present figures of a scheduler, its cache and the kernels, and those that are given."""
    counters = scheduler.counters
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_steps=counters.num_steps,
        num_preemptions=counters.num_preemptions,
        num_prompt_tokens=counters.num_prompt_tokens,
        cached_prompt_tokens=counters.cached_prompt_tokens,
        num_generation_tokens=counters.num_generation_tokens,
        mean_waste=counters.mean_waste,
        cache=scheduler.cache.stats(),
        preemption=_preemption(scheduler),
        finished=dict(counters.finished),
        num_held_up=dict(counters.num_held_up),
        num_lost_steps=counters.num_lost_steps,
        fallbacks=_kernel_fallbacks(),
        adapters=adapters or AdapterStats(),
        overlap=overlap or OverlapStats(),
        experts=experts or ExpertStats(),
    )


def _preemption(scheduler: Scheduler) -> PreemptionStats:
    num_swapped = scheduler.counters.num_swaps
    num_recomputed = scheduler.counters.num_preemptions - num_swapped
    if scheduler.preemption is None:
        return PreemptionStats(num_recomputed=num_recomputed)
    return scheduler.preemption.stats(num_recomputed, num_swapped)


def _kernel_fallbacks() -> Mapping[str, int]:
    """Count kernel calls that did not run on the wanted backend; a process without kernels has none."""
    kernels = sys.modules.get("octavo_kernels")
    if kernels is None:
        return {}
    return {op: fallback.num_calls for op, fallback in kernels.fallbacks().items()}
