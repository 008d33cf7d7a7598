"""What the scheduler asks of a runner in one step, and what the runner answers; no tensors, only deltas.

The runner keeps one row per running sequence: its tokens, its sampling state and its block table. A batch tells it
which rows appear, change and go. Rows that take part in a step stand in the order `new`, then `cached`; a
`ModelOutput` answers in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from octavo_engine.types import Pooling, SamplingParams, Task, TokenLogprobs
from octavo_kvcache import BlockCopy, TableUpdate


class AdapterSlot(NamedTuple):
    """Where a sequence's adapter lies with the runner, and which version of it must lie there."""

    slot: int
    version: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A sequence that enters the runner: after submission, after preemption, or as a fork.

    `token_ids` are all known tokens, prompt and output; `sequence_index` and `seed` fix its noise. A row with
    `fork_of` computes nothing in this step: it samples from the logits of that row, which ends its prompt now.
    `samples` says whether the step reaches the end of the known tokens, so that a new one is drawn: or, where
    `num_candidates` is above 0, so many of the likeliest next tokens are answered and none is drawn. `sampler_state` is
    the last that a ModelOutput brought for the sequence, None before. `adapter` is None for the base model.
    """

    row: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    sequence_index: int
    stop_token_ids: frozenset[int]
    block_ids: tuple[tuple[int, ...], ...]
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool
    fork_of: int | None = None
    task: Task = "generate"
    pooling: Pooling = "last"
    sampler_state: float | None = None
    num_candidates: int = 0
    adapter: AdapterSlot | None = None


class RowMove(NamedTuple):
    """A row that takes a token which the runner did not draw: the scheduler chose it among candidates.

    With a `source` the row first becomes a copy of that one: its tokens before `position`, its block tables, and what
    the runner answers for it.
    """

    row: int
    source: int | None
    position: int
    token_id: int


class CachedRow(NamedTuple):
    """A sequence that the runner knows already; `block_updates` has one entry per KV group, or is empty.

    A named tuple, since there is one per decoding sequence in every step: it is cheap to make, and `zip(*rows)` turns
    rows into columns.
    """

    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool
    block_updates: tuple[TableUpdate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One step.

    `finished` rows are released first, then `copies` are applied, `new` rows enter, `moves` are made and `cached` rows
    take their block updates; then the rows are computed.
    """

    step_id: int
    new: tuple[NewRow, ...] = ()
    cached: tuple[CachedRow, ...] = ()
    finished: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    moves: tuple[RowMove, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows that take part in the step, forks included."""
        return len(self.new) + len(self.cached)

    @property
    def rows(self) -> list[int]:
        """The rows that take part in the step, in order."""
        return [new.row for new in self.new] + [cached.row for cached in self.cached]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(r.num_scheduled_tokens for r in self.new) + sum(r.num_scheduled_tokens for r in self.cached)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutput:
    """The answer to a batch, on the host, one entry per row in the batch's order.

    `token_ids` is ragged: empty for a row that only computed a part of its prompt. `logprobs` is None where none were
    asked for. `pooled` maps a place in the batch to an embedding. `sampler_states` maps a place to what the sequence's
    next draw depends on beside its tokens. `prompt_logprobs` maps a place to those of a prompt that ended, from its
    second token on. `candidates` maps a place to the likeliest next tokens, best first, and their log-probabilities.
    `errors` maps a place to why that row alone failed.
    """

    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] | None = None
    pooled: dict[int, tuple[float, ...]] | None = None
    sampler_states: dict[int, float] | None = None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] | None = None
    candidates: dict[int, tuple[list[int], list[float]]] | None = None
    errors: dict[int, str] | None = None
