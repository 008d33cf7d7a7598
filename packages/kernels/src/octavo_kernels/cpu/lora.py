"""Low-rank adapters of the `cpu` backend: native code where activations are fp32, torch elsewhere."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import lora as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.lora import LoraPart, lora_span_inputs
from octavo_kernels.row_groups import RowGroups

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lora_shrink(x: Tensor, a: Tensor, groups: RowGroups, ranks: Tensor, out: Tensor) -> None:
    """Fill out as `octavo_kernels.lora_shrink` says."""
    if library_for("lora_shrink") is None or not _is_served("lora_shrink", x, a):
        return in_torch.lora_shrink(x, a, groups, ranks, out)
    part = abi.LoraPart(a=pointer(a), ranks=pointer(ranks))
    return _launch(abi.OpKind.LORA_SHRINK, [part], groups, out[None], (a, ranks), x=x, a_dtype=a.dtype)


def lora_expand(shrunk: Tensor, b: Tensor, groups: RowGroups, ranks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Add to out as `octavo_kernels.lora_expand` says."""
    if library_for("lora_expand") is None or not _is_served("lora_expand", out, b):
        return in_torch.lora_expand(shrunk, b, groups, ranks, scales, out)
    by_rank = _by_rank(b)
    part = abi.LoraPart(b=pointer(by_rank), ranks=pointer(ranks), scales=pointer(scales), num_columns=b.shape[1])
    return _launch(
        abi.OpKind.LORA_EXPAND, [part], groups, shrunk[None], (by_rank, ranks, scales), out=out, b_dtype=b.dtype
    )


def lora_linear(x: Tensor, parts: Sequence[LoraPart], groups: RowGroups, out: Tensor, shrunk: Tensor) -> None:
    """Add to out as `octavo_kernels.lora_linear` says."""
    if library_for("lora_linear") is None or not all(
        _is_served("lora_linear", activations, weights)
        for part in parts
        for activations, weights in ((x, part.a), (out, part.b))
    ):
        return in_torch.lora_linear(x, parts, groups, out, shrunk)
    by_rank = [_by_rank(part.b) for part in parts]
    natives = [
        abi.LoraPart(
            a=pointer(part.a),
            b=pointer(b),
            ranks=pointer(part.ranks),
            scales=pointer(part.scales),
            factors=pointer(part.factors),
            first_column=part.first_column,
            num_columns=part.b.shape[1],
        )
        for part, b in zip(parts, by_rank, strict=True)
    ]
    tensors = [*by_rank, *(tensor for part in parts for tensor in (part.a, part.ranks, part.scales, part.factors))]
    return _launch(
        abi.OpKind.LORA_LINEAR, natives, groups, shrunk, tensors,
        x=x, out=out, a_dtype=parts[0].a.dtype, b_dtype=parts[0].b.dtype,
    )  # fmt: skip


def _launch(
    kind: abi.OpKind,
    parts: Sequence[abi.LoraPart],
    groups: RowGroups,
    shrunk: Tensor,
    tensors: Sequence[Tensor | None],
    *,
    x: Tensor | None = None,
    out: Tensor | None = None,
    a_dtype: torch.dtype = torch.float32,
    b_dtype: torch.dtype = torch.float32,
) -> None:
    """Run or record an op; `tensors` are what the parts point to."""
    num_spans, num_tokens, max_rank = shrunk.shape[1:]
    array = (abi.LoraPart * len(parts))(*parts)
    args = abi.LoraArgs(
        x=pointer(x),
        out=pointer(out),
        parts=ctypes.addressof(array),
        rows=pointer(groups.rows),
        groups=pointer(groups.groups),
        shrunk=pointer(shrunk),
        x_stride=0 if x is None else x.stride(0),
        out_stride=0 if out is None else out.stride(0),
        num_parts=len(parts),
        num_tiles=len(groups.groups),
        tile_rows=groups.tile_rows,
        num_spans=num_spans,
        span_inputs=0 if x is None else lora_span_inputs(x.shape[1]),
        shrunk_part_stride=shrunk.stride(0),
        shrunk_span_stride=num_tokens * max_rank,
        max_rank=max_rank,
        in_features=0 if x is None else x.shape[1],
        a_dtype=abi.DTYPE_CODES[a_dtype],
        b_dtype=abi.DTYPE_CODES[b_dtype],
    )
    args.array = array  # lives as long as the arguments
    launch(kind, args, num_tokens, x, out, groups.rows, groups.groups, shrunk, *tensors)


def _by_rank(b: Tensor) -> Tensor:
    """Return b as [num_adapters, max_rank, out_features]: as it lies there, or a copy."""
    return b.transpose(1, 2).contiguous()


def _is_served(op: str, activations: Tensor, weights: Tensor) -> bool:
    if activations.dtype == torch.float32 and weights.dtype in _DTYPES:
        return True
    note_fallback(op, "activations are not float32; convert them with .float()")
    return False
