"""update_rows, expand_rows and advance_rows by torch's indexing."""

import torch
from torch import Tensor

from octavo_kernels.row_state import StepTensors


def update_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    new_num_computed_tokens: Tensor,
    new_last_tokens: Tensor,
    runs: Tensor,
    run_starts: Tensor,
    block_ids: Tensor,
) -> None:
    """Set lengths and tokens by row, and blocks one run after the other."""
    num_computed_tokens[rows] = new_num_computed_tokens
    last_tokens[rows] = torch.where(new_last_tokens >= 0, new_last_tokens, last_tokens[rows])
    ends = run_starts[1:].tolist()
    for (group, row, first), start, end in zip(runs.tolist(), run_starts.tolist(), ends, strict=False):
        block_tables[group, row, first : first + end - start] = block_ids[start:end]


def expand_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    query_start_loc: Tensor | None,
    token_ids: Tensor | None,
    logits_seqs: Tensor | None,
    out: StepTensors,
    block_size: int,
    max_query_len: int,  # noqa: ARG001 - the grid of a kernel
    max_seq_len: int,
) -> None:
    """Give each token its sequence, and look everything else up by that."""
    num_seqs, num_tokens = len(rows), len(rows if token_ids is None else token_ids)
    starts = torch.arange(num_seqs + 1, device=rows.device) if query_start_loc is None else query_start_loc.long()
    query_lens, computed = starts.diff(), num_computed_tokens[rows].long()
    seqs = torch.arange(num_seqs, device=rows.device).repeat_interleave(query_lens, output_size=num_tokens)
    positions = computed[seqs] + torch.arange(num_tokens, device=rows.device) - starts[seqs]
    last = last_tokens[rows[seqs]]
    out.token_ids[:num_tokens] = last if token_ids is None else torch.where(token_ids >= 0, token_ids.long(), last)
    out.positions[:num_tokens] = positions
    blocks = block_tables[:, rows[seqs], positions // block_size].long()
    out.slot_mapping[:, :num_tokens] = blocks * block_size + positions % block_size
    out.slot_mapping[:, num_tokens:] = -1
    out.query_start_loc[: num_seqs + 1] = starts
    out.query_start_loc[num_seqs + 1 :] = num_tokens
    out.seq_lens[:num_seqs] = computed + query_lens
    out.seq_lens[num_seqs:] = 0
    num_blocks = -(-max_seq_len // block_size)
    out.block_tables[:, :num_seqs, :num_blocks] = block_tables[:, rows, :num_blocks]
    ends = starts[1:] if logits_seqs is None else starts[1:][logits_seqs]
    out.logits_indices[: len(ends)] = ends - 1


def advance_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    drawing_rows: Tensor,
    token_ids: Tensor,
) -> None:
    """Set both by row."""
    num_computed_tokens[rows] = seq_lens
    last_tokens[drawing_rows] = token_ids
