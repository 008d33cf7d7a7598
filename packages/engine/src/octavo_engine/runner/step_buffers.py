"""StepBuffers: the host memory of a step's tensors, allocated once for the largest step there can be."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor


class Buffer(NamedTuple):
    """A tensor on the CPU and a numpy array on the same memory."""

    tensor: Tensor
    array: NDArray[Any]

    @classmethod
    def zeros(cls, *shape: int, dtype: torch.dtype) -> Buffer:
        """Allocate a buffer."""
        tensor = torch.zeros(shape, dtype=dtype)
        return cls(tensor, tensor.numpy())


class GroupBuffers(NamedTuple):
    """Of a KV group: block_table [max_num_seqs, max_num_blocks] int32, slot_mapping [max_num_tokens] int64."""

    block_table: Buffer
    slot_mapping: Buffer


class StepBuffers:
    """Where a step's tensors lie. They never move, so that a recorded program may read them by address.

    A step of n tokens and m sequences is the first n or m entries of each; what comes after is left over from steps
    before. A row of a block table is always `max_num_blocks` entries long, of which only those of the sequence's tokens
    mean anything.

    Args:
        max_num_tokens: tokens that a step can compute.
        max_num_seqs: sequences that a step can have.
        max_num_blocks: blocks that a sequence can have.
        num_groups: KV groups.

    Attributes:
        token_ids: [max_num_tokens] int64.
        positions: [max_num_tokens] int64.
        query_start_loc: [max_num_seqs + 1] int32.
        seq_lens: [max_num_seqs] int32.
        logits_indices: [max_num_seqs] int64.
        groups: one per KV group.
    """

    __slots__ = ("groups", "logits_indices", "positions", "query_start_loc", "seq_lens", "token_ids")

    def __init__(self, *, max_num_tokens: int, max_num_seqs: int, max_num_blocks: int, num_groups: int) -> None:
        self.token_ids = Buffer.zeros(max_num_tokens, dtype=torch.int64)
        self.positions = Buffer.zeros(max_num_tokens, dtype=torch.int64)
        self.query_start_loc = Buffer.zeros(max_num_seqs + 1, dtype=torch.int32)
        self.seq_lens = Buffer.zeros(max_num_seqs, dtype=torch.int32)
        self.logits_indices = Buffer.zeros(max_num_seqs, dtype=torch.int64)
        self.groups = tuple(
            GroupBuffers(
                block_table=Buffer.zeros(max_num_seqs, max_num_blocks, dtype=torch.int32),
                slot_mapping=Buffer.zeros(max_num_tokens, dtype=torch.int64),
            )
            for _ in range(num_groups)
        )
