"""Penalties in Triton: one program per penalised row and run of tokens."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    prompt_bitmask: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    rows: Tensor | None,
    table_rows: Tensor | None,
) -> None:
    """Change the logits of tokens that were seen."""
    vocab_size = logits.shape[1]
    values = (repetition, frequency, presence, rows, table_rows)
    _penalise[(len(repetition), triton.cdiv(vocab_size, _BLOCK))](
        logits, output_counts, prompt_bitmask, *values, vocab_size,
        logits.stride(0), output_counts.stride(0), prompt_bitmask.stride(0),
        *(0 if value is None else value.stride(0) for value in values), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _penalise(
    logits_ptr, counts_ptr, bitmask_ptr, repetition_ptr, frequency_ptr, presence_ptr, rows_ptr, table_rows_ptr,
    vocab_size, logits_stride, counts_stride, bitmask_stride, repetition_stride, frequency_stride, presence_stride,
    rows_stride, table_rows_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    repetition = tl.load(repetition_ptr + index * repetition_stride)
    frequency = tl.load(frequency_ptr + index * frequency_stride)
    presence = tl.load(presence_ptr + index * presence_stride)
    if (repetition == 1.0) & (frequency == 0.0) & (presence == 0.0):
        return
    row = index
    if rows_ptr is not None:
        row = tl.load(rows_ptr + index * rows_stride)
    table = index
    if table_rows_ptr is not None:
        table = tl.load(table_rows_ptr + index * table_rows_stride)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    counts = tl.load(counts_ptr + table * counts_stride + tokens, mask=inside, other=0)
    words = tl.load(bitmask_ptr + table * bitmask_stride + tokens // 32, mask=inside, other=0)
    drawn = counts > 0
    seen = drawn | (((words >> (tokens % 32)) & 1) == 1)
    places = logits_ptr + row * logits_stride + tokens
    scores = tl.load(places, mask=inside & seen, other=0.0)
    changed = tl.where(scores > 0.0, tl.div_rn(scores, repetition + tl.zeros_like(scores)), scores * repetition)
    changed = changed - frequency * counts.to(tl.float32) - tl.where(drawn, presence, 0.0)
    tl.store(places, changed, mask=inside & seen)
