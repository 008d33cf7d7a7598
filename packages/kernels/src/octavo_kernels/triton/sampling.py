"""sample_tokens in Triton: a program owns a draw (many in the interpreter) and never sorts.

Without filters one pass over the row is enough: it finds the largest logit and, by scores relative to a logit of the
first columns, the largest score + noise. Scores relative to the largest logit could only tell otherwise where the two
best are as near as rounding; then, and with filters, a second pass takes the largest among the exact scores.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.triton._launch import next_power_of_2, rows_of_a_program
from octavo_kernels.triton.filters import COLUMNS, load_filter, load_logits, lowest_kept
from octavo_kernels.triton.noise import gumbel_tile

_ROUNDING = tl.constexpr(2.0**-19)  # of a score, what the operations that lead to it round off and more
_WIDEST_NOISE = tl.constexpr(32.0)


def sample_tokens(logits: Tensor, options: DrawOptions, token_ids: Tensor, best: Tensor) -> None:
    """Fill token_ids and best [draws]."""
    num_draws, vocab_size = len(token_ids), logits.shape[1]
    columns = min(COLUMNS, max(4, next_power_of_2(vocab_size)))
    rows = rows_of_a_program(num_draws, columns)
    o = options
    values = (o.source_rows, o.temperature, o.top_k, o.top_p, o.min_p, o.seeds, o.sequence_index, o.positions)
    _sample[(triton.cdiv(num_draws, rows),)](
        logits, *values, token_ids, best, num_draws, vocab_size, logits.stride(0),
        *(0 if value is None else value.stride(0) for value in values),
        ROWS=rows, COLUMNS=columns, FILTERED=any(v is not None for v in (o.top_k, o.top_p, o.min_p)), num_warps=8,
    )  # fmt: skip


@triton.jit
def first_largest(values, indices):
    """Return [ROWS] the largest of values [ROWS, COLUMNS], and the least of the indices where it is."""
    largest = tl.max(values, 1)
    return largest, tl.min(tl.where(values == largest[:, None], indices, 0x7FFFFFFF), 1)


@triton.jit
def draw_kept(
    rows, live, vocab_size, largest, heat, lowest, seeds, sequence_index, positions, COLUMNS: tl.constexpr
):  # fmt: skip
    """Return [ROWS] the token with the largest score + noise among the scores that are not below `lowest`."""
    num_rows: tl.constexpr = rows.shape[0]
    best = tl.full([num_rows, COLUMNS], float("-inf"), tl.float32)
    best_index = tl.zeros([num_rows, COLUMNS], tl.int32)
    for first in range(0, vocab_size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        logits = load_logits(rows, live, first, vocab_size, COLUMNS)
        scores = tl.div_rn(logits - largest[:, None], heat[:, None] + tl.zeros_like(logits))
        sums = scores + gumbel_tile(seeds, sequence_index, positions, first, COLUMNS)
        better = (scores >= lowest[:, None]) & (sums > best)
        best = tl.where(better, sums, best)
        best_index = tl.where(better, columns, best_index)
    return first_largest(best, best_index)[1]


@triton.jit
def _sample(
    logits_ptr, source_rows, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, sequence_index_ptr,
    positions_ptr, token_ids, best_ptr, num_draws, vocab_size, logits_stride, source_stride, temperature_stride,
    top_k_stride, top_p_stride, min_p_stride, seeds_stride, sequence_stride, positions_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    draws = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = draws < num_draws
    source = draws
    if source_rows is not None:
        source = tl.load(source_rows + draws * source_stride, mask=inside, other=0)
    rows = logits_ptr + source * logits_stride
    temperature = tl.load(temperature_ptr + draws * temperature_stride, mask=inside, other=0.0)
    seeds = tl.load(seeds_ptr + draws * seeds_stride, mask=inside, other=0)
    sequence_index = tl.load(sequence_index_ptr + draws * sequence_stride, mask=inside, other=0)
    positions = tl.load(positions_ptr + draws * positions_stride, mask=inside, other=0)
    heat = tl.where(temperature > 0.0, temperature, 1.0)
    drawing = (tl.max(temperature, 0) > 0.0) & (not FILTERED)

    anchor = tl.max(load_logits(rows, inside, 0, vocab_size, COLUMNS), 1)
    anchor = tl.where(tl.abs(anchor) < float("inf"), anchor, 0.0)
    largest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    largest_index = tl.zeros([ROWS, COLUMNS], tl.int32)
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    second = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    best_index = tl.zeros([ROWS, COLUMNS], tl.int32)
    poisoned = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, vocab_size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        logits = load_logits(rows, inside, first, vocab_size, COLUMNS)
        poisoned = poisoned | (logits != logits).to(tl.int32)
        larger = logits > largest
        largest = tl.where(larger, logits, largest)
        largest_index = tl.where(larger, columns, largest_index)
        if drawing:
            sums = (logits - anchor[:, None]) / heat[:, None]
            sums += gumbel_tile(seeds, sequence_index, positions, first, COLUMNS)
            better = sums > best
            second = tl.where(better, best, tl.maximum(second, sums))
            best = tl.where(better, sums, best)
            best_index = tl.where(better, columns, best_index)
    row_largest, token = first_largest(largest, largest_index)
    bad = tl.max(poisoned, 1) > 0
    live = inside & (temperature > 0.0) & (tl.abs(row_largest) < float("inf")) & ~bad
    shift = tl.where(live, row_largest, 0.0)

    lowest = tl.full([ROWS], float("-inf"), tl.float32)
    sure = tl.zeros([ROWS], tl.int32) > 0
    if FILTERED:
        lowest = lowest_kept(
            rows, live, vocab_size, shift, heat,
            load_filter(top_k_ptr, draws, inside, top_k_stride), load_filter(top_p_ptr, draws, inside, top_p_stride),
            load_filter(min_p_ptr, draws, inside, min_p_stride), COLUMNS,
        )  # fmt: skip
    else:
        row_best, drawn = first_largest(best, best_index)
        others = tl.where((best == row_best[:, None]) & (best_index == drawn[:, None]), second, best)
        margin = (tl.abs(row_best) + _WIDEST_NOISE) * _ROUNDING
        sure = tl.max(others, 1) < row_best - margin
        token = tl.where(live & sure, drawn, token)
    unsure = live & ~sure
    if tl.max(unsure.to(tl.int32), 0) > 0:
        drawn = draw_kept(
            rows, live, vocab_size, shift, heat, lowest, seeds, sequence_index, positions, COLUMNS
        )  # fmt: skip
        token = tl.where(unsure, drawn, token)
    tl.store(token_ids + draws, token.to(tl.int64), mask=inside)
    tl.store(best_ptr + draws, tl.where(bad, float("nan"), row_largest), mask=inside)
