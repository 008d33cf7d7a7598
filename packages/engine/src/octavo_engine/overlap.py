"""OverlapStats: how often a step was launched while the one before was still being computed, and by which graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GraphStats:
    """Counters of the steps that did not wait, by how the model was run in them; zero where there are no graphs.

    `num_captured` counts graphs, `num_replayed` steps that replayed one. `num_eager` counts the others by what stood in
    the way: `prompt`, a sequence with more than one token where such steps have no graphs; `tokens`, more of them than
    the largest graph for such steps has; `rows`, more sequences than the largest one for decode steps has; `capture`,
    the first step of a size, which is run while its graph is captured; `memory`, the graphs have taken what was set
    aside for them; `failed`, capturing has failed.
    """

    num_captured: int = 0
    num_replayed: int = 0
    num_eager: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: GraphStats) -> GraphStats:
        return GraphStats(
            self.num_captured + other.num_captured,
            self.num_replayed + other.num_replayed,
            _sum(self.num_eager, other.num_eager),
        )


@dataclass(frozen=True, slots=True)
class OverlapStats:
    """Counters since the start of an executor that overlaps steps; zero for others.

    `num_overlapped` counts steps that did not wait for the results of earlier ones. `num_waited` counts those that
    did, by what made them wait: `rules` that go by the tokens before or work on the host (penalties, banned words,
    DRY, grammars, processors, Mirostat, typical_p, XTC), `logprobs`, `prompt_logprobs`, `beams`, `pooling`,
    `adapters`; where a model is shared out among stages, `rows` whose tokens were still to be drawn, or which changed
    hands. `graphs` says how the model was run in those that did not wait.
    """

    num_overlapped: int = 0
    num_waited: Mapping[str, int] = field(default_factory=dict)
    graphs: GraphStats = field(default_factory=GraphStats)

    def __add__(self, other: OverlapStats) -> OverlapStats:
        return OverlapStats(
            self.num_overlapped + other.num_overlapped,
            _sum(self.num_waited, other.num_waited),
            self.graphs + other.graphs,
        )


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}
