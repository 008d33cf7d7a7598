"""Log-probabilities in Triton: a program owns a row (many in the interpreter), and finds the likeliest one by one."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import next_power_of_2, rows_of_a_program
from octavo_kernels.triton.filters import COLUMNS, load_logits
from octavo_kernels.triton.sampling import first_largest


def token_logprobs(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    """Fill all that is returned."""
    num_rows, vocab_size = logits.shape
    columns = min(COLUMNS, next_power_of_2(vocab_size))
    rows = rows_of_a_program(num_rows, columns)
    _logprobs[(triton.cdiv(num_rows, rows),)](
        logits, token_ids, logprobs, ranks, top_ids, top_logprobs, num_rows, vocab_size, top_ids.shape[1],
        logits.stride(0), token_ids.stride(0), ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip


@triton.jit
def largest_and_mass(rows, live, vocab_size, heat, COLUMNS: tl.constexpr):
    """Return [ROWS] the largest logit, the first token that has it, and the sum of exp((logit - largest) / heat)."""
    num_rows: tl.constexpr = rows.shape[0]
    largest = tl.full([num_rows, COLUMNS], float("-inf"), tl.float32)
    index = tl.zeros([num_rows, COLUMNS], tl.int32)
    for first in range(0, vocab_size, COLUMNS):
        logits = load_logits(rows, live, first, vocab_size, COLUMNS)
        larger = logits > largest
        largest = tl.where(larger, logits, largest)
        index = tl.where(larger, first + tl.arange(0, COLUMNS)[None, :], index)
    row_largest, token = first_largest(largest, index)
    shift = tl.where(tl.abs(row_largest) < float("inf"), row_largest, 0.0)
    mass = tl.zeros([num_rows, COLUMNS], tl.float32)
    for first in range(0, vocab_size, COLUMNS):
        logits = load_logits(rows, live, first, vocab_size, COLUMNS)
        mass += tl.exp(tl.div_rn(logits - shift[:, None], heat[:, None] + tl.zeros_like(logits)))
    return shift, token, tl.sum(mass, 1)


@triton.jit
def _logprobs(
    logits_ptr, token_ids_ptr, logprobs_ptr, ranks_ptr, top_ids_ptr, top_logprobs_ptr, num_rows, vocab_size, num_top,
    logits_stride, token_ids_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    places = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = places < num_rows
    rows = logits_ptr + places * logits_stride
    shift, _, mass = largest_and_mass(rows, live, vocab_size, tl.full([ROWS], 1.0, tl.float32), COLUMNS)
    log_mass = tl.log(tl.where(live, mass, 1.0))
    chosen = tl.load(
        rows + tl.load(token_ids_ptr + places * token_ids_stride, mask=live, other=0), mask=live, other=0.0
    )
    num_larger = tl.zeros([ROWS], tl.int32)
    for first in range(0, vocab_size, COLUMNS):
        logits = load_logits(rows, live, first, vocab_size, COLUMNS)
        num_larger += tl.sum((logits > chosen[:, None]).to(tl.int32), 1)
    tl.store(logprobs_ptr + places, chosen - shift - log_mass, mask=live)
    tl.store(ranks_ptr + places, num_larger.to(tl.int64) + 1, mask=live)

    last = tl.full([ROWS], float("inf"), tl.float32)
    last_token = tl.full([ROWS], -1, tl.int32)
    for number in range(num_top):
        best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        best_index = tl.full([ROWS, COLUMNS], 0x7FFFFFFF, tl.int32)
        for first in range(0, vocab_size, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)[None, :]
            logits = load_logits(rows, live, first, vocab_size, COLUMNS)
            behind = (logits < last[:, None]) | ((logits == last[:, None]) & (columns > last_token[:, None]))
            # A token at -inf is not larger than nothing, and yet comes before it.
            better = behind & (columns < vocab_size) & ((logits > best) | (best_index == 0x7FFFFFFF))
            best = tl.where(better, logits, best)
            best_index = tl.where(better, columns, best_index)
        last, last_token = first_largest(best, best_index)
        tl.store(top_ids_ptr + places * num_top + number, last_token.to(tl.int64), mask=live)
        tl.store(top_logprobs_ptr + places * num_top + number, last - shift - log_mass, mask=live)
