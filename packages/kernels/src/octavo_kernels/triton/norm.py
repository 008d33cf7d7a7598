"""Root-mean-square norms in Triton: one program per row (many in the interpreter), which it holds in registers.

The order of the sums depends on the length of a row alone.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._codes import CodeOutput
from octavo_kernels.triton._codes import store_codes, stored
from octavo_kernels.triton._launch import as_rows, check_dtypes, next_power_of_2, rows_of_a_program

_LONGEST = 32768


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Fill out with the norm of x."""
    _launch("rms_norm", x, None, weight, eps, offset, out, None)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Add x to the residual, then fill out with the norm of the stored sum."""
    _launch("add_rms_norm", x, residual, weight, eps, offset, out, None)


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, offset: float, output: CodeOutput) -> None:
    """Fill the output with the norm of x."""
    _launch("rms_norm_quant", x, None, weight, eps, offset, output.codes, output)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, output: CodeOutput
) -> None:
    """Add x to the residual, then fill the output with the norm of the stored sum."""
    _launch("add_rms_norm_quant", x, residual, weight, eps, offset, output.codes, output)


def _launch(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    out: Tensor,
    output: CodeOutput | None,
) -> None:
    check_dtypes(op, x=x, weight=weight)
    size = x.shape[-1]
    _check.option(f"{op} (triton)", "hidden", size, size <= _LONGEST, f"at most {_LONGEST}")
    x_rows, out_rows = as_rows(op, "x", x), as_rows(op, "out", out)
    sums = x_rows if residual is None else as_rows(op, "residual", residual)
    block, num_rows = next_power_of_2(size), x_rows.shape[0] * x_rows.shape[1]
    rows = rows_of_a_program(num_rows, block)
    _norm[(triton.cdiv(num_rows, rows),)](
        x_rows, None if residual is None else sums, weight, out_rows, None if output is None else output.scales,
        num_rows, x_rows.shape[1], eps, offset, *x_rows.stride()[:2], *sums.stride()[:2], *out_rows.stride()[:2],
        0 if output is None else output.scales.shape[-1],
        SIZE=size, ROWS=rows, BLOCK=block,
        GROUPS=1 if output is None else -(-block // next_power_of_2(output.group_size)),
        LARGEST=0.0 if output is None else output.largest, FIXED=output is not None and output.is_fixed,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


@triton.jit
def _norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scales_ptr, num_rows, num_inner, eps, offset,
    x_stride_o, x_stride_i, residual_stride_o, residual_stride_i, out_stride_o, out_stride_i, num_scales,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    outer = rows // num_inner
    inner = rows % num_inner
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < SIZE)
    x = tl.load(x_ptr + outer * x_stride_o + inner * x_stride_i + columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = residual_ptr + outer * residual_stride_o + inner * residual_stride_i + columns
        total = stored(x + tl.load(residual, mask=mask, other=0.0).to(tl.float32), residual_ptr.dtype.element_ty)
        tl.store(residual, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    normed = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps))[:, None] * (offset + weight)
    out = out_ptr + outer * out_stride_o + inner * out_stride_i + columns
    if scales_ptr is None:
        tl.store(out, stored(normed, out_ptr.dtype.element_ty), mask=mask)
    else:
        store_codes(normed, out, mask, scales_ptr, rows, num_rows, 0, num_scales, GROUPS, LARGEST, FIXED)
