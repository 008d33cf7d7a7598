"""What an engine has done since its start, counted exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from octavo_engine.types import NOTHING_CACHED, CachedTokens


@dataclass(slots=True)
class SchedulerCounters:
    """What has happened since the start; only the scheduler writes it."""

    num_steps: int = 0
    num_lost_steps: int = 0  # with the keys and values of all tokens
    num_preemptions: int = 0
    num_swaps: int = 0  # of the preemptions, those that kept the blocks on the host
    num_prompt_tokens: int = 0
    cached_prompt_tokens: CachedTokens = NOTHING_CACHED
    num_generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    num_held_up: Counter[str] = field(default_factory=Counter)  # steps that left somebody waiting, by what was missing
    sum_waste: float = 0.0

    def count_cached(self, cached: CachedTokens) -> None:
        """Count what was cached of a prompt that was admitted for the first time."""
        if any(cached):
            self.cached_prompt_tokens = CachedTokens(*map(sum, zip(self.cached_prompt_tokens, cached, strict=True)))

    @property
    def mean_waste(self) -> float:
        """KV waste averaged over the steps so far; 0 before the first."""
        return self.sum_waste / self.num_steps if self.num_steps else 0.0
