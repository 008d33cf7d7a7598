"""The ops of an engine whose running sequences live on the device: what a step reads of them, and leaves behind."""

from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


class StepTensors(NamedTuple):
    """Where `expand_rows` puts a step of up to num_seqs sequences and num_tokens tokens; 1 is every last stride.

    Attributes:
        token_ids: [num_tokens] int64.
        positions: [num_tokens] int64.
        query_start_loc: [num_seqs + 1] int32, where each sequence's tokens begin.
        seq_lens: [num_seqs] int32, tokens of each sequence up to and with this step's.
        logits_indices: [num_logits_rows] int64, the tokens whose logits are wanted.
        block_tables: [num_groups, num_seqs, max_num_blocks] int32.
        slot_mapping: [num_groups, num_tokens] int64; -1 skips the token.
    """

    token_ids: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    logits_indices: Tensor
    block_tables: Tensor
    slot_mapping: Tensor


_OUT_DTYPES = {
    "out.token_ids": torch.int64,
    "out.positions": torch.int64,
    "out.query_start_loc": torch.int32,
    "out.seq_lens": torch.int32,
    "out.logits_indices": torch.int64,
    "out.block_tables": torch.int32,
    "out.slot_mapping": torch.int64,
}


def update_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    *,
    rows: Tensor,
    new_num_computed_tokens: Tensor,
    new_last_tokens: Tensor,
    runs: Tensor,
    run_starts: Tensor,
    block_ids: Tensor,
) -> None:
    """Write what has changed into the state of some rows, in place.

    Args:
        num_computed_tokens: [max_num_rows] int32; modified.
        last_tokens: [max_num_rows] int64; modified.
        block_tables: [num_groups, max_num_rows, max_num_blocks] int32, 1 as its last stride; modified.
        rows: [num_rows] int32, distinct, those whose length is set.
        new_num_computed_tokens: [num_rows] int32.
        new_last_tokens: [num_rows] int64; -1 leaves the row its token.
        runs: [num_runs, 3] int32, runs of entries of block tables that are set: group, row, first entry. No entry is in
            two of them.
        run_starts: [num_runs + 1] int32, where each run's blocks begin among `block_ids`; the last is their number.
        block_ids: [num_blocks] int32.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "update_rows"
    changes = {
        "rows": rows,
        "new_num_computed_tokens": new_num_computed_tokens,
        "new_last_tokens": new_last_tokens,
        "runs": runs,
        "run_starts": run_starts,
        "block_ids": block_ids,
    }
    device = _check_state(op, num_computed_tokens, last_tokens, block_tables, **changes)
    _check_vector(op, rows=rows, block_ids=block_ids, new_num_computed_tokens=new_num_computed_tokens)
    _check.shape(op, "new_num_computed_tokens", new_num_computed_tokens, rows.shape)
    _check.shape(op, "new_last_tokens", new_last_tokens, rows.shape)
    _check.dtype(op, "new_last_tokens", new_last_tokens, torch.int64)
    _check.shape(op, "runs", runs, ("num_runs", 3))
    _check.dtype(op, "runs", runs, torch.int32)
    _check.shape(op, "run_starts", run_starts, (len(runs) + 1,))
    _check.dtype(op, "run_starts", run_starts, torch.int32)
    _check.contiguous(op, **changes)
    if len(rows) or len(runs):
        state = num_computed_tokens, last_tokens, block_tables
        implementation(op, device)(*state, *changes.values())


def expand_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    *,
    block_size: int,
    max_query_len: int,
    max_seq_len: int,
    out: StepTensors,
    query_start_loc: Tensor | None = None,
    token_ids: Tensor | None = None,
    logits_seqs: Tensor | None = None,
) -> None:
    """Make a step's input out of the state of its rows: tokens, positions, slots, lengths and block tables.

    Sequence i of the step is row rows[i], which goes on at position num_computed_tokens[rows[i]]. `out` may be larger
    than the step: sequences that the step does not have get no token and a length of 0, and tokens that it does not
    have the slot -1; their other entries, and those of a block table past the sequence's blocks, are left as they are.

    Args:
        num_computed_tokens: [max_num_rows] int32.
        last_tokens: [max_num_rows] int64, the token that each row has yet to compute.
        block_tables: [num_groups, max_num_rows, max_num_blocks] int32, 1 as its last stride.
        rows: [num_seqs] int32, distinct.
        block_size: tokens in a block.
        max_query_len: the most tokens of one sequence in this step, or more.
        max_seq_len: the most tokens of one sequence up to and with this step's, or more.
        out: what is written.
        query_start_loc: [num_seqs + 1] int32; None for a step in which each sequence computes its last token.
        token_ids: [num_tokens] int32; -1 for a sequence's last token. Goes with query_start_loc.
        logits_seqs: [num_logits_rows] int32, the sequences whose last tokens' logits are wanted; None for all of them.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.
        OptionError: a number is not positive, or only one of query_start_loc and token_ids is given.

    """
    op = "expand_rows"
    given = {"rows": rows, "query_start_loc": query_start_loc, "token_ids": token_ids, "logits_seqs": logits_seqs}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    results = dict(zip(_OUT_DTYPES, out, strict=True))
    device = _check_state(op, num_computed_tokens, last_tokens, block_tables, **tensors, **results)
    _check_vector(op, **tensors)
    together = (query_start_loc is None) == (token_ids is None)
    _check.option(op, "token_ids", token_ids, together, "a tensor beside query_start_loc, None without it")
    for name, value in (("block_size", block_size), ("max_query_len", max_query_len), ("max_seq_len", max_seq_len)):
        _check.option(op, name, value, value > 0, "at least 1")
    if query_start_loc is not None:
        _check.shape(op, "query_start_loc", query_start_loc, (len(rows) + 1,))
    num_tokens = len(rows if token_ids is None else token_ids)
    _check_out(op, out, block_tables, results)
    for name, tensor, needed in (
        ("token_ids", out.token_ids, num_tokens),
        ("seq_lens", out.seq_lens, len(rows)),
        ("logits_indices", out.logits_indices, len(rows if logits_seqs is None else logits_seqs)),
    ):
        if len(tensor) < needed:
            _check.option(op, f"the length of out.{name}", len(tensor), False, f"at least {needed}")
    implementation(op, device)(
        num_computed_tokens, last_tokens, block_tables, rows, query_start_loc, token_ids, logits_seqs, out,
        block_size, max_query_len, max_seq_len,
    )  # fmt: skip


def advance_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    *,
    rows: Tensor,
    seq_lens: Tensor,
    drawing_rows: Tensor,
    token_ids: Tensor,
) -> None:
    """Let rows go on from what a step has computed and drawn, in place.

    Args:
        num_computed_tokens: [max_num_rows] int32; modified.
        last_tokens: [max_num_rows] int64; modified.
        rows: [num_seqs] int32, distinct, those of the step.
        seq_lens: [num_seqs] int32, tokens that each of them has computed now.
        drawing_rows: [num_draws] int32, distinct.
        token_ids: [num_draws] int64, the token that each of them has drawn.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "advance_rows"
    changes = {"rows": rows, "seq_lens": seq_lens, "drawing_rows": drawing_rows, "token_ids": token_ids}
    device = _check_state(op, num_computed_tokens, last_tokens, None, **changes)
    _check_vector(op, rows=rows, seq_lens=seq_lens, drawing_rows=drawing_rows)
    _check.shape(op, "seq_lens", seq_lens, rows.shape)
    _check.shape(op, "token_ids", token_ids, drawing_rows.shape)
    _check.dtype(op, "token_ids", token_ids, torch.int64)
    _check.contiguous(op, token_ids=token_ids)
    if len(rows) or len(drawing_rows):
        implementation(op, device)(num_computed_tokens, last_tokens, rows, seq_lens, drawing_rows, token_ids)


def _check_state(
    op: str, num_computed_tokens: Tensor, last_tokens: Tensor, block_tables: Tensor | None, **others: Tensor
) -> torch.device:
    """Check the rows' state, and return the device that everything is on."""
    state = {"num_computed_tokens": num_computed_tokens, "last_tokens": last_tokens, "block_tables": block_tables}
    device = _check.same_device(op, **state, **others)
    _check_vector(op, num_computed_tokens=num_computed_tokens)
    _check.shape(op, "last_tokens", last_tokens, num_computed_tokens.shape)
    _check.dtype(op, "last_tokens", last_tokens, torch.int64)
    _check.contiguous(op, last_tokens=last_tokens)
    if block_tables is not None:
        _check.shape(op, "block_tables", block_tables, ("num_groups", len(last_tokens), "max_num_blocks"))
        _check.dtype(op, "block_tables", block_tables, torch.int32)
        _check.last_dim_contiguous(op, block_tables=block_tables)
    return device


def _check_vector(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _check.rank(op, name, tensor, ("num_entries",))
        _check.dtype(op, name, tensor, torch.int32)
    _check.contiguous(op, **tensors)


def _check_out(op: str, out: StepTensors, block_tables: Tensor, results: dict[str, Tensor]) -> None:
    num_groups, _, max_num_blocks = block_tables.shape
    _check.rank(op, "out.token_ids", out.token_ids, ("num_tokens",))
    _check.rank(op, "out.seq_lens", out.seq_lens, ("num_seqs",))
    _check.rank(op, "out.logits_indices", out.logits_indices, ("num_logits_rows",))
    num_tokens, num_seqs = len(out.token_ids), len(out.seq_lens)
    _check.shape(op, "out.positions", out.positions, (num_tokens,))
    _check.shape(op, "out.query_start_loc", out.query_start_loc, (num_seqs + 1,))
    _check.shape(op, "out.block_tables", out.block_tables, (num_groups, num_seqs, max_num_blocks))
    _check.shape(op, "out.slot_mapping", out.slot_mapping, (num_groups, num_tokens))
    for name, tensor in results.items():
        _check.dtype(op, name, tensor, _OUT_DTYPES[name])
    _check.last_dim_contiguous(op, **results)
