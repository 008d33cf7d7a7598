"""Token masks in Triton: one program per mask and run of tokens."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor | None) -> None:
    """Remove the tokens whose bit is 0."""
    num_masks, vocab_size = len(bitmask), logits.shape[1]
    _mask[(num_masks, triton.cdiv(vocab_size, _BLOCK))](
        logits, bitmask, rows, vocab_size, logits.stride(0), bitmask.stride(0), BLOCK=_BLOCK, num_warps=4
    )


@triton.jit
def _mask(logits, bitmask, rows, vocab_size, logits_stride, bitmask_stride, BLOCK: tl.constexpr):
    mask = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    words = tl.load(bitmask + mask * bitmask_stride + tokens // 32, mask=inside, other=-1)
    forbidden = ((words >> (tokens % 32)) & 1) == 0
    row = mask
    if rows is not None:
        row = tl.load(rows + mask)
    tl.store(logits + row * logits_stride + tokens, float("-inf"), mask=inside & forbidden)
