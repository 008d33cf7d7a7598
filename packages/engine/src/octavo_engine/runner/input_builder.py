"""InputBuilder: makes a step's ModelInput out of the runner's rows, in buffers that stay where they are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.decode_inputs import DecodeInputs
from octavo_engine.runner.decode_step import DecodeStep
from octavo_engine.runner.model_input import GroupInput, KVLayer, ModelInput
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_buffers import StepBuffers
from octavo_engine.runner.step_rows import StepRows

_Shape = tuple[int, int, int, int, int]
"""num_tokens, num_seqs, blocks of the longest sequence, max_query_len, num_logits_rows."""


class InputBuilder:
    """Fills the buffers, without a Python object per token, and cuts a step out of them.

    On a CPU the tensors of a ModelInput are the buffers' own memory: they hold until the next step is built, and a step
    of the same shape as the one before gets the same ModelInput. On another device they are copies.

    Args:
        buffers: where the tensors lie on the host.
        kv_layers: passed on.
        block_size: tokens in a block.
        device: where the model is.

    Attributes:
        buffers: where the tensors lie on the host.
        decoding: fills the buffers for decode steps, and knows the rows of the last one.
    """

    def __init__(
        self, buffers: StepBuffers, kv_layers: tuple[KVLayer, ...], *, block_size: int, device: torch.device
    ) -> None:
        self.buffers = buffers
        self._kv_layers = kv_layers
        self._block_size = block_size
        self._device = device
        self.decoding = DecodeInputs(buffers, block_size=block_size)
        self._last: tuple[_Shape, ModelInput] | None = None

    def build(self, step: StepRows, rows: Rows, logits_indices: NDArray[np.int64]) -> ModelInput:
        """Make the tensors of a step that computes tokens.

        Args:
            step: the rows of the step.
            rows: the runner's rows, up to date with the batch; not modified.
            logits_indices: [num_logits_rows], the tokens whose logits are wanted.
        """
        self.decoding.forget()
        return self._cut(self._ragged(step, rows, logits_indices))

    def decode(self, step: DecodeStep, rows: Rows) -> ModelInput:
        """Make the tensors of a decode step; every token's logits are wanted."""
        self.decoding.fill(step, rows)
        num_seqs, num_blocks = len(step.row_ids), max(step.positions) // self._block_size + 1
        return self._cut((num_seqs, num_seqs, num_blocks, 1, num_seqs))

    def largest(self) -> ModelInput:
        """Return the input that fills the buffers, whatever they hold."""
        buffers = self.buffers
        max_num_blocks = max((group.block_table.array.shape[1] for group in buffers.groups), default=0)
        num_tokens, num_seqs = len(buffers.token_ids.array), len(buffers.seq_lens.array)
        return self._view(num_tokens, num_seqs, max_num_blocks, num_tokens, num_seqs)

    def _ragged(self, step: StepRows, rows: Rows, logits_indices: NDArray[np.int64]) -> _Shape:
        buffers = self.buffers
        computing = step.num_scheduled_tokens > 0
        row_ids, first_positions = step.rows[computing], step.num_computed_tokens[computing]
        query_lens = step.num_scheduled_tokens[computing]
        num_seqs, num_logits_rows = len(row_ids), len(logits_indices)
        starts = buffers.query_start_loc.array[: num_seqs + 1]
        starts[0] = 0
        np.cumsum(query_lens, out=starts[1:])
        # Token t of sequence s has position first_positions[s] + t - starts[s].
        positions = np.repeat(first_positions - starts[:-1], query_lens)
        num_tokens = len(positions)
        positions += np.arange(num_tokens)
        token_rows = np.repeat(row_ids, query_lens)
        seq_lens = first_positions + query_lens
        buffers.positions.array[:num_tokens] = positions
        buffers.token_ids.array[:num_tokens] = rows.token_ids[token_rows, positions]
        buffers.seq_lens.array[:num_seqs] = seq_lens
        buffers.logits_indices.array[:num_logits_rows] = logits_indices
        num_blocks = -(-int(seq_lens.max()) // self._block_size)
        self._set_blocks(rows, row_ids, token_rows, positions, num_blocks)
        return num_tokens, num_seqs, num_blocks, int(query_lens.max()), num_logits_rows

    def _set_blocks(
        self,
        rows: Rows,
        row_ids: NDArray[np.int64],
        token_rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        num_blocks: int,
    ) -> None:
        """Fill block tables and slots; a slot is block_id * block_size + offset."""
        block_indices, offsets = np.divmod(positions, self._block_size)
        for table, group in zip(rows.block_tables, self.buffers.groups, strict=True):
            slots = group.slot_mapping.array[: len(positions)]
            np.multiply(table[token_rows, block_indices], self._block_size, out=slots, dtype=np.int64)
            np.add(slots, offsets, out=slots)
            group.block_table.array[: len(row_ids), :num_blocks] = table[row_ids, :num_blocks]

    def _cut(self, shape: _Shape) -> ModelInput:
        """Return the ModelInput of the shape: the last one if it can serve again."""
        if self._last is not None and self._last[0] == shape:
            return self._last[1]
        model_input = self._view(*shape)
        if self._device.type == "cpu":
            self._last = shape, model_input
        return model_input

    def _view(
        self, num_tokens: int, num_seqs: int, num_blocks: int, max_query_len: int, num_logits_rows: int
    ) -> ModelInput:
        """Cut a step out of the buffers."""
        buffers = self.buffers

        def on_device(tensor: Tensor) -> Tensor:  # the copy is over, or the bytes are staged, when this returns
            return tensor.to(self._device, non_blocking=True)

        return ModelInput(
            token_ids=on_device(buffers.token_ids.tensor[:num_tokens]),
            positions=on_device(buffers.positions.tensor[:num_tokens]),
            query_start_loc=on_device(buffers.query_start_loc.tensor[: num_seqs + 1]),
            seq_lens=on_device(buffers.seq_lens.tensor[:num_seqs]),
            max_query_len=max_query_len,
            logits_indices=on_device(buffers.logits_indices.tensor[:num_logits_rows]),
            groups=tuple(
                GroupInput(
                    block_table=on_device(group.block_table.tensor[:num_seqs, :num_blocks]),
                    slot_mapping=on_device(group.slot_mapping.tensor[:num_tokens]),
                )
                for group in buffers.groups
            ),
            kv_layers=self._kv_layers,
        )
