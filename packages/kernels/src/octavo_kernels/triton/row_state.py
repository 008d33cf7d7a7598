"""The state of rows in Triton: a program has a stretch of one sequence's tokens and blocks, or some rows' numbers."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.row_state import StepTensors

_TILE = 256  # tokens, blocks or rows of a program


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
    """Launch one program per run of blocks, and behind them as many as the rows take."""
    _update[(len(runs) + triton.cdiv(len(rows), _TILE),)](
        num_computed_tokens, last_tokens, block_tables, rows, new_num_computed_tokens, new_last_tokens, runs,
        run_starts, block_ids, len(rows), len(runs), *block_tables.stride()[:2], TILE=_TILE, num_warps=4,
    )  # fmt: skip


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
    max_query_len: int,
    max_seq_len: int,
) -> None:
    """Launch a program per sequence that `out` has and stretch of the longest, and one column for what is behind."""
    most = max(max_query_len, triton.cdiv(max_seq_len, block_size))
    _expand[(len(out.seq_lens) + 1, triton.cdiv(most, _TILE))](
        num_computed_tokens, last_tokens, block_tables, rows, query_start_loc, token_ids, logits_seqs, *out,
        len(rows), len(rows if token_ids is None else token_ids), len(rows if logits_seqs is None else logits_seqs),
        len(out.seq_lens), len(out.token_ids), *block_tables.stride()[:2], *out.block_tables.stride()[:2],
        out.slot_mapping.stride(0),
        NUM_GROUPS=len(block_tables), BLOCK_SIZE=block_size, TILE=_TILE, num_warps=4,
    )  # fmt: skip


def advance_rows(
    num_computed_tokens: Tensor,
    last_tokens: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    drawing_rows: Tensor,
    token_ids: Tensor,
) -> None:
    """Launch a program per stretch of rows."""
    num_seqs, num_draws = len(rows), len(drawing_rows)
    _advance[(triton.cdiv(max(num_seqs, num_draws), _TILE),)](
        num_computed_tokens, last_tokens, rows, seq_lens, drawing_rows, token_ids, num_seqs, num_draws,
        TILE=_TILE, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_runs"])
def _update(
    num_computed_tokens, last_tokens, tables, rows, new_num_computed_tokens, new_last_tokens, runs, run_starts,
    block_ids, num_rows, num_runs, table_stride_g, table_stride_r, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_runs:
        group = tl.load(runs + program * 3).to(tl.int64)
        row = tl.load(runs + program * 3 + 1).to(tl.int64)
        start = tl.load(run_starts + program)
        end = tl.load(run_starts + program + 1)
        run = tables + group * table_stride_g + row * table_stride_r + tl.load(runs + program * 3 + 2)
        for first in range(start, end, TILE):
            blocks = first + tl.arange(0, TILE)
            tl.store(run + blocks - start, tl.load(block_ids + blocks, mask=blocks < end), mask=blocks < end)
    else:
        places = (program - num_runs) * TILE + tl.arange(0, TILE)
        inside = places < num_rows
        some_rows = tl.load(rows + places, mask=inside, other=0)
        tl.store(num_computed_tokens + some_rows, tl.load(new_num_computed_tokens + places, mask=inside), mask=inside)
        tokens = tl.load(new_last_tokens + places, mask=inside, other=-1)
        tl.store(last_tokens + some_rows, tokens, mask=inside & (tokens >= 0))


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "num_logits_rows", "max_num_seqs", "max_num_tokens"])
def _expand(
    num_computed_tokens, last_tokens, tables, rows, given_starts, given_tokens, logits_seqs,
    token_ids, positions, query_start_loc, seq_lens, logits_indices, out_tables, slot_mapping,
    num_seqs, num_tokens, num_logits_rows, max_num_seqs, max_num_tokens,
    table_stride_g, table_stride_r, out_stride_g, out_stride_s, slot_stride_g,
    NUM_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if sequence < num_seqs:
        row = tl.load(rows + sequence).to(tl.int64)
        computed = tl.load(num_computed_tokens + row)
        last = tl.load(last_tokens + row)
        start = sequence
        end = sequence + 1
        if given_starts is not None:
            start = tl.load(given_starts + sequence)
            end = tl.load(given_starts + sequence + 1)
        inside = places < end - start
        tokens = tl.zeros((TILE,), tl.int64) + last
        if given_tokens is not None:
            given = tl.load(given_tokens + start + places, mask=inside, other=-1).to(tl.int64)
            tokens = tl.where(given >= 0, given, tokens)
        at = computed + places
        tl.store(token_ids + start + places, tokens, mask=inside)
        tl.store(positions + start + places, at.to(tl.int64), mask=inside)
        seq_len = computed + end - start
        held = places < tl.cdiv(seq_len, BLOCK_SIZE)
        for group in tl.static_range(NUM_GROUPS):
            table = tables + group * table_stride_g + row * table_stride_r
            block_id = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            slots = slot_mapping + group * slot_stride_g + start + places
            tl.store(slots, block_id * BLOCK_SIZE + at % BLOCK_SIZE, mask=inside)
            out_table = out_tables + group * out_stride_g + sequence.to(tl.int64) * out_stride_s
            tl.store(out_table + places, tl.load(table + places, mask=held, other=0), mask=held)
        if tl.program_id(1) == 0:
            tl.store(query_start_loc + sequence, start)
            tl.store(seq_lens + sequence, seq_len)
    elif tl.program_id(1) == 0:
        tl.store(query_start_loc + sequence, num_tokens)
        tl.store(seq_lens + sequence, 0, mask=sequence < max_num_seqs)
        if sequence == max_num_seqs:
            for first in range(num_tokens, max_num_tokens, TILE):
                behind = first + tl.arange(0, TILE)
                for group in tl.static_range(NUM_GROUPS):
                    tl.store(slot_mapping + group * slot_stride_g + behind, -1, mask=behind < max_num_tokens)
            for first in range(0, num_logits_rows, TILE):
                wanted = first + tl.arange(0, TILE)
                listed = wanted < num_logits_rows
                index = wanted
                if logits_seqs is not None:
                    index = tl.load(logits_seqs + wanted, mask=listed, other=0)
                if given_starts is not None:
                    index = tl.load(given_starts + index + 1, mask=listed, other=1) - 1
                tl.store(logits_indices + wanted, index.to(tl.int64), mask=listed)


@triton.jit(do_not_specialize=["num_seqs", "num_draws"])
def _advance(
    num_computed_tokens, last_tokens, rows, seq_lens, drawing_rows, token_ids, num_seqs, num_draws, TILE: tl.constexpr
):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = places < num_seqs
    row = tl.load(rows + places, mask=inside, other=0)
    tl.store(num_computed_tokens + row, tl.load(seq_lens + places, mask=inside), mask=inside)
    inside = places < num_draws
    row = tl.load(drawing_rows + places, mask=inside, other=0)
    tl.store(last_tokens + row, tl.load(token_ids + places, mask=inside), mask=inside)
