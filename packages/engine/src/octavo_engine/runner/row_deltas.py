"""RowDeltas: what the device knows of the running rows, and what it must be told before a step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import ScheduledBatch
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.runner.step_rows import StepRows
from octavo_kvcache import TableUpdate

_UNKNOWN = -1
_T = TypeVar("_T")
_Run = tuple[int, int, int, NDArray[np.int32]]
"""group, row, first entry, blocks."""


class RowDelta(NamedTuple, Generic[_T]):
    """What changes in the rows on the device: arrays on the host, then tensors there.

    Attributes:
        rows: [num_rows] int32, those whose numbers are set.
        num_computed_tokens: [num_rows] int32.
        last_tokens: [num_rows] int64; -1 leaves the row its token.
        fractions: [3, num_rows] fp32, temperature, top_p and min_p.
        integers: [3, num_rows] int64, top_k, seed and index of the sequence.
        runs: [num_runs, 3] int32, of entries of block tables: group, row, first entry.
        run_starts: [num_runs + 1] int32, where each run's blocks begin in `block_ids`.
        block_ids: [num_blocks] int32.
    """

    rows: _T
    num_computed_tokens: _T
    last_tokens: _T
    fractions: _T
    integers: _T
    runs: _T
    run_starts: _T
    block_ids: _T


class RowDeltas:
    """Remembers what the device was told. Only the OverlappedRunner calls it.

    A row that enters is told as a whole before its first step there, as is the length of a row that the host has moved
    on; of a block table that the device knows only what changes is told.

    Args:
        max_num_rows: rows there can be.
    """

    def __init__(self, max_num_rows: int) -> None:
        self._lengths = np.full(max_num_rows, _UNKNOWN, np.int64)  # computed tokens, once all that is launched is over
        self._knows_table = np.zeros(max_num_rows, np.bool_)
        self._num_blocks = np.zeros(max_num_rows, np.int64)  # of a row's longest table, on the host
        self._updates: dict[int, tuple[TableUpdate, ...]] = {}  # of tables that the device knows but for these

    def hand_over(self, rows: Iterable[int]) -> None:
        """Take note that rows are others' from now on."""
        for row in rows:
            self._lengths[row] = _UNKNOWN
            self._forget_table(row)

    def note(self, batch: ScheduledBatch) -> None:
        """Take in what a batch changes in block tables, wherever its rows are computed."""
        for new in batch.new:
            self._num_blocks[new.row] = max(map(len, new.block_ids), default=0)
        for move in batch.moves:
            if move.source is not None:
                self._num_blocks[move.row] = self._num_blocks[move.source]
                self._lengths[move.row] = _UNKNOWN
                self._forget_table(move.row)
        for row, _, _, _, updates in batch.cached:
            if updates:
                ends = (first + len(block_ids) for first, block_ids in updates)
                self._num_blocks[row] = max(self._num_blocks[row], *ends)
                if row in self._updates:  # two would have to be told in order
                    self._forget_table(row)
                elif self._knows_table[row]:
                    self._updates[row] = updates

    def take(
        self, step: StepRows, rows: Rows, sampling: SamplingRows, needs_token: NDArray[np.bool_]
    ) -> RowDelta[NDArray[np.generic]] | None:
        """Return what the device must be told before a step, after which it knows that; None if that is nothing.

        Args:
            step: the rows of the step.
            rows: the runner's rows, up to date with the batch.
            sampling: theirs too.
            needs_token: [num_rows], whether the step takes a row's last token from the device, which has another one.
        """
        stale = np.flatnonzero((self._lengths[step.rows] != step.num_computed_tokens) | needs_token)
        self._lengths[step.rows] = step.ends
        runs = self._runs(step.rows, rows)
        if not len(stale) and not runs:
            return None
        told, positions = step.rows[stale], step.num_computed_tokens[stale]
        tokens = np.where(needs_token[stale], rows.token_ids[told, positions], -1)
        fractions, integers = sampling.parameters(told)
        blocks = [run[3] for run in runs]
        return RowDelta(
            rows=told.astype(np.int32),
            num_computed_tokens=positions.astype(np.int32),
            last_tokens=tokens.astype(np.int64),
            fractions=fractions,
            integers=integers,
            runs=np.array([run[:3] for run in runs], np.int32).reshape(len(runs), 3),
            run_starts=np.cumsum([0, *map(len, blocks)], dtype=np.int32),
            block_ids=np.concatenate(blocks) if blocks else np.zeros(0, np.int32),
        )

    def _runs(self, row_ids: NDArray[np.int64], rows: Rows) -> list[_Run]:
        """Return the runs that the device lacks of some rows' block tables, which it has afterwards."""
        whole = row_ids[~self._knows_table[row_ids]]
        self._knows_table[whole] = True
        wholly = (
            (group, row, 0, table[row, : self._num_blocks[row]])
            for row in whole.tolist()
            for group, table in enumerate(rows.block_tables)
        )
        changed = self._updates.keys() & row_ids.tolist() if self._updates else ()
        partly = (
            (group, row, first, np.array(block_ids, np.int32))
            for row in changed
            for group, (first, block_ids) in enumerate(self._updates.pop(row))
        )
        return [run for run in chain(wholly, partly) if len(run[3])]

    def _forget_table(self, row: int) -> None:
        self._knows_table[row] = False
        self._updates.pop(row, None)
