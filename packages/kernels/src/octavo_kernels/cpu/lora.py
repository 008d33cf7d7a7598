"""Low-rank adapters of the `cpu` backend: native code where activations are fp32, torch elsewhere."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import lora as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.lora import lora_span_inputs
from octavo_kernels.row_groups import RowGroups

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lora_shrink(x: Tensor, a: Tensor, groups: RowGroups, ranks: Tensor, out: Tensor) -> None:
    """Fill out as `octavo_kernels.lora_shrink` says."""
    if library_for("lora_shrink") is None or not _is_served("lora_shrink", x, a):
        return in_torch.lora_shrink(x, a, groups, ranks, out)
    num_spans, num_tokens, max_rank = out.shape
    args = abi.LoraShrinkArgs(
        x=pointer(x),
        a=pointer(a),
        rows=pointer(groups.rows),
        groups=pointer(groups.groups),
        ranks=pointer(ranks),
        out=pointer(out),
        x_stride=x.stride(0),
        num_tiles=len(groups.groups),
        tile_rows=groups.tile_rows,
        num_spans=num_spans,
        span_inputs=lora_span_inputs(x.shape[1]),
        out_span_stride=num_tokens * max_rank,
        max_rank=max_rank,
        in_features=x.shape[1],
        a_dtype=abi.DTYPE_CODES[a.dtype],
    )
    return launch(abi.OpKind.LORA_SHRINK, args, num_tokens, x, a, groups.rows, groups.groups, ranks, out)


def lora_expand(shrunk: Tensor, b: Tensor, groups: RowGroups, ranks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Add to out as `octavo_kernels.lora_expand` says."""
    if library_for("lora_expand") is None or not _is_served("lora_expand", out, b):
        return in_torch.lora_expand(shrunk, b, groups, ranks, scales, out)
    by_rank = b.transpose(1, 2)
    if not by_rank.is_contiguous():
        by_rank = by_rank.contiguous()
    num_spans, num_tokens, max_rank = shrunk.shape
    args = abi.LoraExpandArgs(
        shrunk=pointer(shrunk),
        b=pointer(by_rank),
        rows=pointer(groups.rows),
        groups=pointer(groups.groups),
        ranks=pointer(ranks),
        scales=pointer(scales),
        out=pointer(out),
        out_stride=out.stride(0),
        num_tiles=len(groups.groups),
        tile_rows=groups.tile_rows,
        num_spans=num_spans,
        span_stride=num_tokens * max_rank,
        max_rank=max_rank,
        out_features=b.shape[1],
        b_dtype=abi.DTYPE_CODES[b.dtype],
    )
    return launch(
        abi.OpKind.LORA_EXPAND, args, num_tokens, shrunk, by_rank, groups.rows, groups.groups, ranks, scales, out
    )


def _is_served(op: str, activations: Tensor, weights: Tensor) -> bool:
    if activations.dtype == torch.float32 and weights.dtype in _DTYPES:
        return True
    note_fallback(op, "activations are not float32; convert them with .float()")
    return False
