"""The kernels of rows that live on the device, one after the other, as a step has them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

import octavo_kernels as ok

_PRIME = 2**31 - 1


class Maker(Protocol):
    """Makes the numbers of a case; see correctness.py."""

    device: torch.device

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return numbers from low to below high."""
        ...

    def size(self, full: int, smoke: int) -> int:
        """Return a size."""
        ...


def checksums_of_a_step(make: Maker) -> Tensor:
    """Tell rows of a change, expand a step with prompts and decodes, and let the rows advance.

    Returns:
        A checksum of each tensor that was written: one wrong number in any makes a tenth of them differ.
    """
    num_rows, num_blocks, num_groups = make.size(300, 9), make.size(2000, 40), 2
    state = (
        make.integers(0, num_blocks * 8, num_rows, dtype=torch.int32),
        make.integers(0, 1 << 40, num_rows),
        make.integers(1, 1 << 20, num_groups, num_rows, num_blocks, dtype=torch.int32),
    )
    numbers = torch.arange(num_rows, dtype=torch.int32, device=make.device)
    rows, query_lens = numbers.flip(0)[: num_rows - 2], torch.ones(num_rows - 2, dtype=torch.int64, device=make.device)
    query_lens[::7] = make.size(600, 20)
    starts = torch.cat([numbers[:1].long(), query_lens.cumsum(0)])
    num_tokens = int(starts[-1])
    _tell(make, state, numbers)
    out = _out(make, state, num_tokens + 40, num_rows)
    ok.expand_rows(
        *state, rows, block_size=16, max_query_len=make.size(600, 20), max_seq_len=num_blocks * 16, out=out,
        query_start_loc=starts.int(), token_ids=make.integers(-1, 1 << 17, num_tokens, dtype=torch.int32),
        logits_seqs=numbers[: num_rows // 2],
    )  # fmt: skip
    for group, table in enumerate(out.block_tables):  # what is behind a sequence's blocks may be anything
        behind = torch.arange(num_blocks, device=make.device) >= -(-out.seq_lens[:, None] // 16)
        out.block_tables[group] = table.masked_fill(behind, 0)
    drawn = make.integers(0, 1 << 17, num_rows)
    ok.advance_rows(*state[:2], rows=rows, seq_lens=out.seq_lens[: len(rows)], drawing_rows=numbers, token_ids=drawn)
    return torch.stack([_checksum(tensor) for tensor in (*state, *out)])


def _tell(make: Maker, state: tuple[Tensor, Tensor, Tensor], numbers: Tensor) -> None:
    runs = torch.stack([numbers % 2, numbers, numbers % 3], 1)[::3].contiguous()
    starts = numbers[: len(runs) + 1] * 30
    some = numbers[::2].contiguous()
    ok.update_rows(
        *state, rows=some, new_num_computed_tokens=some * 7, new_last_tokens=some.long() - 3, runs=runs,
        run_starts=starts, block_ids=make.integers(1, 1 << 20, int(starts[-1]), dtype=torch.int32),
    )  # fmt: skip


def _out(make: Maker, state: tuple[Tensor, Tensor, Tensor], num_tokens: int, num_seqs: int) -> ok.StepTensors:
    num_groups, _, num_blocks = state[2].shape
    zeros = torch.zeros(num_tokens, dtype=torch.int64, device=make.device)
    lens = torch.zeros(num_seqs + 1, dtype=torch.int32, device=make.device)
    return ok.StepTensors(
        token_ids=zeros,
        positions=zeros.clone(),
        query_start_loc=lens,
        seq_lens=lens[1:].clone(),
        logits_indices=zeros[:num_seqs].clone(),
        block_tables=torch.zeros(num_groups, num_seqs, num_blocks, dtype=torch.int32, device=make.device),
        slot_mapping=zeros.repeat(num_groups, 1),
    )


def _checksum(tensor: Tensor) -> Tensor:
    """Return a number that any change of one entry changes: entries times their places, modulo a prime."""
    values = tensor.reshape(-1).long() % _PRIME
    places = torch.arange(1, len(values) + 1, device=tensor.device) % 65521 + 1
    return (values * places % _PRIME).sum() % _PRIME
