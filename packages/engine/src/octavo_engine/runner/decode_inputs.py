"""DecodeInputs: the step buffers as decode steps fill them, one moving on from the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_engine.runner.decode_step import DecodeStep
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_buffers import StepBuffers


class DecodeInputs:
    """Fills the buffers for steps in which every row computes one token.

    A step of the same rows as the one before, each one token further, moves the buffers on: positions, lengths and
    slots rise by one, and a block table is touched where it changed or a block begins. Any other step, and the first
    after somebody else wrote to the buffers, fills them anew.

    Args:
        buffers: where the tensors lie on the host.
        block_size: tokens in a block.

    Attributes:
        rows: [num_seqs] int64, the runner's rows of the last step; not to be written to.
        ends: [num_seqs] int32, the positions of the tokens that the last step draws: a view, which the next one writes.
    """

    rows: NDArray[np.int64]
    ends: NDArray[np.int32]

    def __init__(self, buffers: StepBuffers, *, block_size: int) -> None:
        self._buffers = buffers
        self._block_size = block_size
        self._set_row_ids(())

    def forget(self) -> None:
        """Take note that the buffers hold something else, or that rows have changed hands without a look at them."""
        if self._row_ids:
            self._set_row_ids(())

    def fill(self, step: DecodeStep, rows: Rows) -> None:
        """Fill the buffers; `rows` is up to date with the step."""
        if step.row_ids == self._row_ids and list(step.positions) == self.ends.tolist():
            self._move_on(step, rows)
        else:
            self._fill_anew(step, rows)
        self._token_ids[:] = rows.token_ids[self.rows, self._positions]

    def _move_on(self, step: DecodeStep, rows: Rows) -> None:
        for rising in self._rising:
            np.add(rising, 1, out=rising)
        for place, (position, changed) in enumerate(zip(step.positions, step.block_updates, strict=True)):
            if changed or position % self._block_size == 0:
                self._set_place(place, step.row_ids[place], position, rows)

    def _set_place(self, place: int, row: int, position: int, rows: Rows) -> None:
        """Fill one sequence's block tables and slots."""
        index, offset = divmod(position, self._block_size)
        for table, group in zip(rows.block_tables, self._buffers.groups, strict=True):
            group.block_table.array[place, : index + 1] = table[row, : index + 1]
            group.slot_mapping.array[place] = int(table[row, index]) * self._block_size + offset

    def _fill_anew(self, step: DecodeStep, rows: Rows) -> None:
        buffers, num_seqs = self._buffers, len(step.row_ids)
        self._set_row_ids(step.row_ids)
        self._positions[:] = step.positions
        np.add(self._positions, 1, out=self.ends, casting="same_kind")
        counting = np.arange(num_seqs + 1)
        buffers.query_start_loc.array[: num_seqs + 1] = counting
        buffers.logits_indices.array[:num_seqs] = counting[:num_seqs]
        indices, offsets = np.divmod(self._positions, self._block_size)
        num_blocks = int(indices.max()) + 1
        for table, group in zip(rows.block_tables, buffers.groups, strict=True):
            blocks = table[self.rows, indices].astype(np.int64)
            group.slot_mapping.array[:num_seqs] = blocks * self._block_size + offsets
            group.block_table.array[:num_seqs, :num_blocks] = table[self.rows, :num_blocks]

    def _set_row_ids(self, row_ids: tuple[int, ...]) -> None:
        """Cut the parts of the buffers that a step of these rows fills."""
        buffers, num_seqs = self._buffers, len(row_ids)
        self._row_ids = row_ids
        self.rows = np.array(row_ids, np.int64)
        self.ends = buffers.seq_lens.array[:num_seqs]
        self._token_ids = buffers.token_ids.array[:num_seqs]
        self._positions = buffers.positions.array[:num_seqs]
        slots = [group.slot_mapping.array[:num_seqs] for group in buffers.groups]
        self._rising: list[NDArray[Any]] = [self._positions, self.ends, *slots]
