"""StepPlan: what attention over cache blocks works out from the indices alone, and shares between layers.

Sequences with equal query_len and about equal length form a bucket; a bucket's blocks are gathered by one index, and
its scores are one batched product. All layers of a model's step pass the same indices, so the last plan of a thread is
kept, and used again when the indices hold the same values.
"""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels.cpu.fallback.attend import Span

# A bucket gathers at most _BUCKET_BYTES of keys, of which at most _PADDING_BYTES may be padding: past that, the time
# spent on padding exceeds that of the ten or so calls of one more bucket.
_BUCKET_BYTES = 4 << 20
_PADDING_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences that are computed together.

    rows: [num_sequences * query_len] int64, their query tokens. block_ids: [num_sequences, longest] int64.
    """

    num_sequences: int
    rows: Tensor
    block_ids: Tensor
    span: Span
    _tile_rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def tile_rows(self, rows_per_block: int, num_heads: int) -> Tensor:
        """Return where each (sequence, head, block) tile lies in a cache seen as rows of one tile, flat."""
        key = rows_per_block, num_heads
        if key not in self._tile_rows:
            heads = torch.arange(num_heads, device=self.block_ids.device)[None, :, None]
            self._tile_rows[key] = (self.block_ids[:, None, :] * rows_per_block + heads).flatten()
        return self._tile_rows[key]


class _Key(NamedTuple):
    block_size: int
    block_bytes: int
    window: int | None


@dataclass(frozen=True, slots=True)
class _Entry:
    key: _Key
    indices: tuple[Tensor, ...]
    buckets: list[Bucket]


class _Memo(threading.local):
    entry: _Entry | None = None


_memo = _Memo()


def plan_step(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    block_size: int,
    block_bytes: int,
    window: int | None,
) -> list[Bucket]:
    """Return the buckets of a step, those of the thread's call before if the indices hold the same values."""
    key = _Key(block_size, block_bytes, window)
    indices = query_start_loc, seq_lens, block_table
    entry = _memo.entry
    if entry is None or entry.key != key or not _equal(entry.indices, indices):
        # Tensors made in inference mode could not be used by autograd outside of it.
        with torch.inference_mode(mode=False):
            sequences = _sequences(query_start_loc.tolist(), seq_lens.tolist(), block_size, window)
            buckets = [_bucket(members, block_table, block_size) for members in _buckets(sequences, block_bytes)]
            entry = _Entry(key, tuple(index.clone() for index in indices), buckets)
        _memo.entry = entry
    return entry.buckets


def _equal(kept: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> bool:
    return all(a.device == b.device and torch.equal(a, b) for a, b in zip(kept, given, strict=True))


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Where one sequence's queries are, and which of its blocks they can see."""

    index: int
    start: int
    query_len: int
    seq_len: int
    first_block: int
    num_blocks: int


def _sequences(starts: list[int], seq_lens: list[int], block_size: int, window: int | None) -> Iterator[_Sequence]:
    for index, seq_len in enumerate(seq_lens):
        query_len = starts[index + 1] - starts[index]
        if query_len == 0:
            continue
        first_block = 0
        if window is not None:
            first_block = max(0, seq_len - query_len - window + 1) // block_size
        num_blocks = (seq_len + block_size - 1) // block_size - first_block
        yield _Sequence(index, starts[index], query_len, seq_len, first_block, num_blocks)


def _buckets(sequences: Iterator[_Sequence], block_bytes: int) -> Iterator[list[_Sequence]]:
    """Group sequences of one query_len, longest first, while the padding and the sum stay small."""
    ordered = sorted(sequences, key=lambda sequence: (sequence.query_len, -sequence.num_blocks))
    for _, same in itertools.groupby(ordered, key=lambda sequence: sequence.query_len):
        bucket: list[_Sequence] = []
        padding = 0
        for sequence in same:
            if bucket:
                longest = bucket[0].num_blocks
                padding += (longest - sequence.num_blocks) * block_bytes
                if padding > _PADDING_BYTES or (len(bucket) + 1) * longest * block_bytes > _BUCKET_BYTES:
                    yield bucket
                    bucket, padding = [], 0
            bucket.append(sequence)
        yield bucket


def _block_ids(block_table: Tensor, bucket: list[_Sequence]) -> Tensor:
    """Return [sequences, longest] int64 block ids; the padding points at the table's first block, or at block 0."""
    longest = bucket[0].num_blocks
    table = block_table.index_select(
        0, torch.tensor([sequence.index for sequence in bucket], device=block_table.device)
    )
    if all(sequence.first_block == 0 for sequence in bucket):
        block_ids = table[:, :longest].long()
    else:
        first = torch.tensor([sequence.first_block for sequence in bucket], device=table.device)
        columns = first[:, None] + torch.arange(longest, device=table.device)
        block_ids = table.long().gather(1, columns.clamp_(max=table.shape[1] - 1))
    if bucket[-1].num_blocks < longest:
        counts = torch.tensor([sequence.num_blocks for sequence in bucket], device=table.device)
        block_ids = block_ids.masked_fill(torch.arange(longest, device=table.device) >= counts[:, None], 0)
    return block_ids


def _rows(bucket: list[_Sequence], device: torch.device) -> Tensor:
    if len(bucket) == 1:
        return torch.arange(bucket[0].start, bucket[0].start + bucket[0].query_len, device=device)
    starts = torch.tensor([sequence.start for sequence in bucket], device=device)
    if bucket[0].query_len == 1:
        return starts
    return (starts[:, None] + torch.arange(bucket[0].query_len, device=device)).flatten()


def _bucket(members: list[_Sequence], block_table: Tensor, block_size: int) -> Bucket:
    block_ids = _block_ids(block_table, members)
    starts = [sequence.first_block * block_size for sequence in members]
    seq_lens = [sequence.seq_len for sequence in members]
    num_columns = block_ids.shape[1] * block_size
    span = Span.make(starts, seq_lens, members[0].query_len, num_columns, block_table.device)
    return Bucket(len(members), _rows(members, block_table.device), block_ids, span)
