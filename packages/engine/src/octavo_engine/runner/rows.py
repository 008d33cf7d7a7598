"""Rows: what the runner keeps of each running sequence, as arrays with one row per sequence."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import CachedRow, NewRow, RowMove


class Rows:
    """Tokens, block tables and tasks of the running sequences. Only the ModelRunner writes it.

    The runner appends the tokens that it draws, so that a later batch may schedule them before the scheduler has seen
    them. Everything is allocated at once; memory that no sequence reaches is never touched and takes no room.

    Attributes:
        token_ids: [max_num_rows, max_num_tokens + 1] int32; the last token that a sequence draws has a place too.
        block_tables: one [max_num_rows, max_num_blocks] int32 per KV group.
        embeds: [max_num_rows] bool, rows whose prompt is pooled.
        pools_mean: [max_num_rows] bool, rows that pool over all tokens of the prompt, not the last alone.
        num_embedding: rows in use whose prompt is pooled.
        num_candidates: [max_num_rows] int64, how many likely next tokens a row answers; 0 where it draws one.
        num_searching: rows in use that answer candidates.
        adapters: [max_num_rows] int64, the slot of each row's adapter; -1 for the base model.
        num_adapted: rows in use that have an adapter.
    """

    def __init__(self, max_num_rows: int, *, max_num_tokens: int, max_num_blocks: int, num_groups: int) -> None:
        self.token_ids = np.zeros((max_num_rows, max_num_tokens + 1), np.int32)
        self.block_tables = [np.zeros((max_num_rows, max_num_blocks), np.int32) for _ in range(num_groups)]
        self.embeds = np.zeros(max_num_rows, np.bool_)
        self.pools_mean = np.zeros(max_num_rows, np.bool_)
        self.num_embedding = 0
        self.num_candidates = np.zeros(max_num_rows, np.int64)
        self.num_searching = 0
        self.adapters = np.full(max_num_rows, -1, np.int64)
        self.num_adapted = 0

    def add(self, new: NewRow) -> None:
        """Fill a row that is new or was released."""
        row, num_tokens = new.row, len(new.token_ids)
        assert row < len(self.token_ids), f"row {row} of {len(self.token_ids)}"
        self.token_ids[row, :num_tokens] = new.token_ids
        self._set_task(row, embeds=new.task == "embed", pools_mean=new.task == "embed" and new.pooling == "mean")
        self._set_candidates(row, new.num_candidates)
        self._set_adapter(row, -1 if new.adapter is None else new.adapter.slot)
        for group, block_ids in enumerate(new.block_ids):
            self.block_tables[group][row, : len(block_ids)] = block_ids

    def release(self, rows: Iterable[int]) -> None:
        """Forget the tasks and adapters of rows whose sequences have left."""
        for row in rows:
            self._set_task(row, embeds=False, pools_mean=False)
            if self.num_searching:
                self._set_candidates(row, 0)
            if self.num_adapted:
                self._set_adapter(row, -1)

    def move(self, moves: Iterable[RowMove]) -> None:
        """Make rows copies of others where they have a source, and let each take its token."""
        for row, source, position, token_id in moves:
            if source is not None:
                self.token_ids[row, :position] = self.token_ids[source, :position]
                for table in self.block_tables:
                    table[row] = table[source]
                self._set_candidates(row, int(self.num_candidates[source]))
                self._set_adapter(row, int(self.adapters[source]))
            self.token_ids[row, position] = token_id

    def update(self, cached: Iterable[CachedRow]) -> None:
        """Take over the block tables' changes."""
        for row, _, _, _, block_updates in cached:
            if block_updates:
                for table, (first, block_ids) in zip(self.block_tables, block_updates, strict=True):
                    table[row, first : first + len(block_ids)] = block_ids

    def append(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64] | NDArray[np.int32], token_ids: NDArray[np.int64]
    ) -> None:
        """Set the token at one position of each of some different rows, behind those known."""
        self.token_ids[rows, positions] = token_ids

    def _set_task(self, row: int, *, embeds: bool, pools_mean: bool) -> None:
        self.num_embedding += embeds - int(self.embeds[row])
        self.embeds[row] = embeds
        self.pools_mean[row] = pools_mean

    def _set_candidates(self, row: int, num_candidates: int) -> None:
        self.num_searching += (num_candidates > 0) - int(self.num_candidates[row] > 0)
        self.num_candidates[row] = num_candidates

    def _set_adapter(self, row: int, slot: int) -> None:
        self.num_adapted += (slot >= 0) - int(self.adapters[row] >= 0)
        self.adapters[row] = slot
