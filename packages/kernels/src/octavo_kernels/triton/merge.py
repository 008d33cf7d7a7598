"""The union of two partial attention results in Triton: one program per tile of rows, pairs of a token and a head."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import check_dtypes, next_power_of_2


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse as `octavo_kernels.merge_states` says."""
    check_dtypes("merge_states", o_a=o_a)
    merge_rows(o_a, lse_a, o_b, lse_b, out, lse, None)


def merge_rows(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, end: Tensor | None
) -> None:
    """Join the first `end` tokens ([1] on the device), or all; out's dtype may be another than that of the sides."""
    num_tokens, num_heads, head_dim = o_a.shape
    block_d = next_power_of_2(head_dim)
    block_r = max(1, 2048 // block_d)
    _merge[(triton.cdiv(num_tokens * num_heads, block_r),)](
        o_a, lse_a, o_b, lse_b, out, lse, end, num_tokens * num_heads, num_heads,
        *o_a.stride(), *o_b.stride(), *out.stride(), *lse_a.stride(), *lse_b.stride(), *lse.stride(),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


@triton.jit
def _merge(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, end, num_rows, num_heads,
    a_stride_t, a_stride_h, a_stride_d, b_stride_t, b_stride_h, b_stride_d, out_stride_t, out_stride_h, out_stride_d,
    lse_a_stride_t, lse_a_stride_h, lse_b_stride_t, lse_b_stride_h, lse_stride_t, lse_stride_h,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    live = rows < num_rows
    tokens = (rows // num_heads).to(tl.int64)
    heads = rows % num_heads
    if end is not None:
        live = live & (tokens < tl.load(end))
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    lse_a = tl.load(lse_a_ptr + tokens * lse_a_stride_t + heads * lse_a_stride_h, mask=live, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + tokens * lse_b_stride_t + heads * lse_b_stride_h, mask=live, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    # Where both are empty the maximum is -inf, and -inf minus -inf would be NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    share_a = tl.exp(lse_a - shift)
    share_b = tl.exp(lse_b - shift)
    total = share_a + share_b
    # An empty side is not read: it may hold NaN, which a share of 0 would not silence.
    a_rows = tokens * a_stride_t + heads * a_stride_h
    b_rows = tokens * b_stride_t + heads * b_stride_h
    a = tl.load(a_ptr + a_rows[:, None] + dims[None, :] * a_stride_d, mask=inside & (share_a > 0.0)[:, None], other=0.0)
    b = tl.load(b_ptr + b_rows[:, None] + dims[None, :] * b_stride_d, mask=inside & (share_b > 0.0)[:, None], other=0.0)
    merged = a.to(tl.float32) * share_a[:, None] + b.to(tl.float32) * share_b[:, None]
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = tokens * out_stride_t + heads * out_stride_h
    out_places = out_rows[:, None] + dims[None, :] * out_stride_d
    tl.store(out_ptr + out_places, merged.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + tokens * lse_stride_t + heads * lse_stride_h, lse, mask=live)
