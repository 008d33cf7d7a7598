"""ModelInput: the tensors of one step, built once and handed down to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch
from octavo_engine.runner.rows import Rows


class KVLayer(NamedTuple):
    """The cache of one layer, k and v [num_blocks, num_kv_heads, block_size, head_dim], and its KV group's index."""

    k_cache: Tensor
    v_cache: Tensor
    group: int


class GroupInput(NamedTuple):
    """What a KV group's layers share: block_table [num_seqs, max_blocks] int32, slot_mapping [num_tokens] int64."""

    block_table: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step on the device. Sequences are the batch's rows that compute tokens, in the batch's order.

    Attributes:
        token_ids: [num_tokens] int64.
        positions: [num_tokens] int64.
        query_start_loc: [num_seqs + 1] int32, where each sequence's tokens begin.
        seq_lens: [num_seqs] int32, tokens of each sequence up to and with this step's.
        max_query_len: the most tokens of one sequence in this step.
        logits_indices: [num_logits_rows] int64, the tokens whose logits are wanted.
        groups: one per KV group.
        kv_layers: one per layer.
    """

    token_ids: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    logits_indices: Tensor
    groups: tuple[GroupInput, ...]
    kv_layers: tuple[KVLayer, ...]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step on the host, in the batch's order, one entry per row in every array.

    Attributes:
        rows: int64, the runner's row.
        num_computed_tokens: int64, before the step.
        num_scheduled_tokens: int64; 0 for a fork.
        token_starts: int64, where the row's tokens begin among the step's.
        samples: bool, whether the row reaches the end of its known tokens.
        sources: int64, the place whose last hidden state the row goes by: its own, or its parent's for a fork.
    """

    rows: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    num_scheduled_tokens: NDArray[np.int64]
    token_starts: NDArray[np.int64]
    samples: NDArray[np.bool_]
    sources: NDArray[np.int64]

    @classmethod
    def of(cls, batch: ScheduledBatch) -> StepRows:
        """Collect the rows of a batch."""
        scheduled: list[NewRow | CachedRow] = [*batch.new, *batch.cached]
        rows = _int64([r.row for r in scheduled])
        num_scheduled_tokens = _int64([r.num_scheduled_tokens for r in scheduled])
        sources = np.arange(len(scheduled))
        for place, new in enumerate(batch.new):
            if new.fork_of is not None:
                sources[place] = np.flatnonzero(rows == new.fork_of)[0]
        return cls(
            rows=rows,
            num_computed_tokens=_int64([r.num_computed_tokens for r in scheduled]),
            num_scheduled_tokens=num_scheduled_tokens,
            token_starts=np.cumsum(num_scheduled_tokens) - num_scheduled_tokens,
            samples=np.array([r.samples for r in scheduled], np.bool_),
            sources=sources,
        )

    def last_tokens(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index among the step's tokens of the last token of some places."""
        last: NDArray[np.int64] = self.token_starts[places] + self.num_scheduled_tokens[places] - 1
        return last


def build(
    step: StepRows,
    rows: Rows,
    kv_layers: tuple[KVLayer, ...],
    *,
    logits_indices: NDArray[np.int64],
    block_size: int,
    device: torch.device,
) -> ModelInput:
    """Make a step's tensors from the runner's rows, without a Python object per token.

    Args:
        step: the rows of the step.
        rows: the runner's rows, up to date with the batch; not modified.
        kv_layers: passed on.
        logits_indices: [num_logits_rows], passed on.
        block_size: tokens in a block.
        device: where the tensors go.
    """
    computing = step.num_scheduled_tokens > 0
    row_ids, first_positions = step.rows[computing], step.num_computed_tokens[computing]
    query_lens = step.num_scheduled_tokens[computing]
    seq_lens = first_positions + query_lens
    query_start_loc = np.zeros(len(row_ids) + 1, np.int32)
    np.cumsum(query_lens, out=query_start_loc[1:])
    # Token t of sequence s has position first_positions[s] + t - query_start_loc[s].
    shifts = np.repeat(first_positions - query_start_loc[:-1], query_lens)
    positions = np.arange(len(shifts)) + shifts
    token_rows = np.repeat(row_ids, query_lens)

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    num_blocks = -(-int(seq_lens.max()) // block_size)
    block_indices, offsets = np.divmod(positions, block_size)
    groups = tuple(
        GroupInput(
            block_table=tensor(table[row_ids, :num_blocks]),
            slot_mapping=tensor(table[token_rows, block_indices].astype(np.int64) * block_size + offsets),
        )
        for table in rows.block_tables
    )
    return ModelInput(
        token_ids=tensor(rows.token_ids[token_rows, positions].astype(np.int64)),
        positions=tensor(positions),
        query_start_loc=tensor(query_start_loc),
        seq_lens=tensor(seq_lens.astype(np.int32)),
        max_query_len=int(query_lens.max()),
        logits_indices=tensor(logits_indices),
        groups=groups,
        kv_layers=kv_layers,
    )


def _int64(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)
