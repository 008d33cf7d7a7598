"""Rows: what the runner keeps of each running sequence, as arrays with one row per sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import CachedRow, NewRow

_FIRST_NUM_COLUMNS = 128


class Rows:
    """Tokens, block tables and tasks of the running sequences. Only the ModelRunner writes it.

    The runner appends the tokens that it draws, so that a later batch may schedule them before the scheduler has seen
    them.

    Attributes:
        token_ids: [max_num_rows, columns] int32; the columns grow with the longest sequence.
        num_tokens: [max_num_rows] int64.
        block_tables: one [max_num_rows, columns] int32 per KV group.
        embeds: [max_num_rows] bool, rows whose prompt is pooled.
        pools_mean: [max_num_rows] bool, rows that pool over all tokens of the prompt, not the last alone.
    """

    def __init__(self, max_num_rows: int, num_groups: int) -> None:
        self.token_ids: NDArray[np.int32] = np.zeros((max_num_rows, _FIRST_NUM_COLUMNS), np.int32)
        self.num_tokens = np.zeros(max_num_rows, np.int64)
        self.block_tables: list[NDArray[np.int32]] = [
            np.zeros((max_num_rows, _FIRST_NUM_COLUMNS), np.int32) for _ in range(num_groups)
        ]
        self.embeds = np.zeros(max_num_rows, np.bool_)
        self.pools_mean = np.zeros(max_num_rows, np.bool_)

    def add(self, new: NewRow) -> None:
        """Fill a row, whatever it held before."""
        row, num_tokens = new.row, len(new.token_ids)
        assert row < len(self.num_tokens), f"row {row} of {len(self.num_tokens)}"
        self.token_ids = with_columns(self.token_ids, num_tokens + 1)
        self.token_ids[row, :num_tokens] = new.token_ids
        self.num_tokens[row] = num_tokens
        self.embeds[row] = new.task == "embed"
        self.pools_mean[row] = new.task == "embed" and new.pooling == "mean"
        for group, block_ids in enumerate(new.block_ids):
            self._set_blocks(group, row, 0, block_ids)

    def update(self, cached: Iterable[CachedRow]) -> None:
        """Take over the block tables' changes."""
        for change in cached:
            for group, (first, block_ids) in enumerate(change.block_updates):
                self._set_blocks(group, change.row, first, block_ids)

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Append one token to each of some different rows."""
        if not len(rows):
            return
        ends = self.num_tokens[rows]
        self.token_ids = with_columns(self.token_ids, int(ends.max()) + 1)
        self.token_ids[rows, ends] = token_ids
        self.num_tokens[rows] += 1

    def _set_blocks(self, group: int, row: int, first: int, block_ids: Sequence[int]) -> None:
        table = self.block_tables[group] = with_columns(self.block_tables[group], first + len(block_ids))
        table[row, first : first + len(block_ids)] = block_ids


def with_columns(array: NDArray[Any], num_columns: int) -> NDArray[Any]:
    """Return the array, or a wider copy with zeros in the new columns if it has fewer than `num_columns`."""
    if num_columns <= array.shape[1]:
        return array
    width = max(num_columns, 2 * array.shape[1])
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))
