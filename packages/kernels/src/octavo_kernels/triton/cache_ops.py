"""Cache writes in Triton: one program per token and head of k or v."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import check_dtypes, next_power_of_2


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot."""
    check_dtypes("write_kv", k=k, v=v)
    num_tokens, num_kv_heads, head_dim = k.shape
    _write[(num_tokens, num_kv_heads)](
        k, v, k_cache, v_cache, slot_mapping,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[2], BLOCK_D=next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip


@triton.jit
def _write(
    k_ptr, v_ptr, k_cache, v_cache, slot_mapping, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    kc_stride_b, kc_stride_h, kc_stride_o, vc_stride_b, vc_stride_h, vc_stride_o,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block_id = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + dims, mask=mask)
    v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + dims, mask=mask)
    k_row = k_cache + block_id * kc_stride_b + head * kc_stride_h + offset * kc_stride_o
    v_row = v_cache + block_id * vc_stride_b + head * vc_stride_h + offset * vc_stride_o
    tl.store(k_row + dims, k.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_row + dims, v.to(v_cache.dtype.element_ty), mask=mask)
