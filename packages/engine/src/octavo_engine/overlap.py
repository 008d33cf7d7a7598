"""OverlapStats: how often a step was launched while the one before was still being computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class OverlapStats:
    """Counters since the start of an executor that overlaps steps; zero for others.

    `num_overlapped` counts steps that did not wait for the results of earlier ones. `num_waited` counts those that
    did, by what made them wait: `rules` that go by the tokens before or work on the host (penalties, banned words,
    DRY, grammars, processors, Mirostat, typical_p, XTC), `logprobs`, `prompt_logprobs`, `beams`, `pooling`,
    `adapters`; where a model is shared out among stages, `rows` whose tokens were still to be drawn, or which changed
    hands.
    """

    num_overlapped: int = 0
    num_waited: Mapping[str, int] = field(default_factory=dict)
