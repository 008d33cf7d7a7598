"""Lookup: one look into the prefix cache; LookupCounts: what many of them asked for and found."""

from dataclasses import dataclass
from typing import NamedTuple


class Lookup(NamedTuple):
    """What one look-up asked for and found, in tokens; `resumed` if it was for a sequence that had lost its blocks."""

    num_query_tokens: int
    num_full_hit_tokens: int
    num_partial_hit_tokens: int
    resumed: bool


@dataclass(slots=True)
class LookupCounts:
    """Sums over the look-ups for sequences that were then admitted, since the start.

    Attributes:
        num_lookups: look-ups.
        num_query_tokens: tokens looked up.
        num_full_hit_tokens: those of them that lay in whole cached blocks.
        num_partial_hit_tokens: those at the start of a cached block that goes on otherwise.

    """

    num_lookups: int = 0
    num_query_tokens: int = 0
    num_full_hit_tokens: int = 0
    num_partial_hit_tokens: int = 0

    def add(self, lookup: Lookup) -> None:
        """Count one more."""
        self.num_lookups += 1
        self.num_query_tokens += lookup.num_query_tokens
        self.num_full_hit_tokens += lookup.num_full_hit_tokens
        self.num_partial_hit_tokens += lookup.num_partial_hit_tokens

    @property
    def num_hit_tokens(self) -> int:
        """Tokens that were cached, whichever way."""
        return self.num_full_hit_tokens + self.num_partial_hit_tokens

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up tokens that were cached; 0 before the first look-up."""
        return self.num_hit_tokens / self.num_query_tokens if self.num_query_tokens else 0.0
