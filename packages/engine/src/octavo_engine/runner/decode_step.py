"""DecodeStep: the rows of a step that does nothing but decode, as columns."""

from __future__ import annotations

from typing import NamedTuple

from octavo_engine.batch import ScheduledBatch
from octavo_kvcache import TableUpdate


class DecodeStep(NamedTuple):
    """A step in which every row is known, computes one token and draws the next: token, row and draw are the same.

    Plain numbers, not arrays: most such steps differ from the one before by so little that arrays do not pay.

    Attributes:
        row_ids: the runner's rows.
        positions: of the token that each row computes.
        block_updates: what changes in each row's block tables, nothing for most.
    """

    row_ids: tuple[int, ...]
    positions: tuple[int, ...]
    block_updates: tuple[tuple[TableUpdate, ...], ...]

    @classmethod
    def of(cls, batch: ScheduledBatch) -> DecodeStep | None:
        """Return a batch that has rows as a decode step; None if it is anything else."""
        if batch.new:
            return None
        row_ids, positions, num_scheduled_tokens, samples, block_updates = zip(*batch.cached, strict=True)
        if num_scheduled_tokens.count(1) < len(row_ids) or not all(samples):
            return None
        return cls(row_ids, positions, block_updates)
