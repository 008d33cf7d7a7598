"""Matrices of quantised checkpoints as grouped weights, which native products on a CPU read in their codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from octavo_engine.quant.schemes.bitsandbytes import INT8_STEP, RowBytes, Table4
from octavo_engine.weights.grouped_integers import GroupedIntegers
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import E2M1, Float4, ScaledFloats
from octavo_kernels import (
    Finish,
    GroupedCodes,
    GroupedWeight,
    KernelError,
    NestedScales,
    grouped_argmax,
    grouped_linear,
    pack_grouped,
)

_SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float8_e4m3fn)
_WHOLE_BYTE = 8
_MIDDLE = 128


def as_grouped(weight: QuantizedTensor) -> GroupedWeight | None:
    """Return a weight packed for native products, its values the same bit for bit; None if it has no such form.

    It has none if its groups are of other sizes than products take or uneven, as those of columns that were cut off a
    matrix with an order of inputs, or if it holds codes or scales that are not numbers.
    """
    codes = _READERS[_family(weight)](weight) if _family(weight) in _READERS else None
    if codes is None:
        return None
    try:
        return pack_grouped(codes)
    except KernelError:  # sizes of groups, of blocks of scales, or zeros
        return None


class GroupedProduct:
    """A weight that stays in its codes and is multiplied natively; on a CPU, for activations in fp32."""

    def __init__(self, weight: GroupedWeight) -> None:
        self._weight = weight
        self.num_bytes = weight.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Multiply codes, into `out` if given."""
        return grouped_linear(x, self._weight, bias, out=out)

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each row's product is largest, and how large."""
        return grouped_argmax(x, self._weight)


def _family(weight: QuantizedTensor) -> type[QuantizedTensor]:
    return GroupedIntegers if isinstance(weight, GroupedIntegers) else type(weight)


def _integers(weight: GroupedIntegers) -> GroupedCodes | None:
    if weight.scales.dtype not in _SCALES or not weight.has_even_groups():
        return None
    order = None if weight.groups is None else weight.groups.argsort(stable=True)
    codes = weight.codes() if order is None else weight.codes()[order]
    zeros, zero = _zeros(weight)
    made = GroupedCodes(codes.T, weight.scales.T, weight.group_size, weight.bits, order=order)
    if weight.bits == _WHOLE_BYTE:
        if zeros is None and zero != _MIDDLE:
            zeros = torch.full(weight.scales.T.shape, zero)
        signed = (codes.T ^ _MIDDLE).view(torch.int8)
        return replace(made, codes=signed, zeros=zeros, middle=0 if zeros is None else _MIDDLE)
    middle = zero if zeros is None else 1 << (weight.bits - 1)
    levels = torch.arange(1 << weight.bits).float() - middle
    return replace(made, levels=levels, zeros=zeros, middle=0 if zeros is None else middle)


def _zeros(weight: GroupedIntegers) -> tuple[Tensor | None, int]:
    """Return the zeros of all groups, or the one that all have."""
    if weight.zeros is None:
        return None, weight.zero_point
    first = int(weight.zeros[0, 0])
    return (None, first) if bool((weight.zeros == first).all()) else (weight.zeros.T, 0)


def _scaled_floats(weight: ScaledFloats) -> GroupedCodes | None:
    if weight.codes.dtype not in (torch.int8, torch.float8_e4m3fn) or not _are_numbers(weight.codes, weight.scales):
        return None
    scales = weight.scales[torch.arange(weight.shape[0]) // weight.block[0]]
    size = weight.shape[1] if scales.shape[1] == 1 else weight.block[1]
    return GroupedCodes(weight.codes, scales, size, _WHOLE_BYTE)


def _float4(weight: Float4) -> GroupedCodes | None:
    finish = [
        (kind, factor)
        for kind, factor in ((Finish.OVER, weight.divisor), (Finish.TIMES, weight.factor))
        if factor is not None
    ]
    of_scales = weight.scales.dtype == torch.float8_e4m3fn
    if not _are_numbers(weight.scales) or len(finish) > of_scales or any(factor.numel() != 1 for _, factor in finish):
        return None
    codes = torch.stack([weight.codes & 15, weight.codes >> 4], dim=-1).flatten(-2)
    levels = torch.tensor([*E2M1, *(-value for value in E2M1)])
    kind, factor = (finish[0][0], float(finish[0][1])) if finish else (Finish.NONE, 1.0)
    return GroupedCodes(codes, weight.scales, weight.group_size, 4, levels, finish=kind, factor=factor)


def _table4(weight: Table4) -> GroupedCodes | None:
    out_features, in_features = weight.shape
    if in_features % weight.block_size or not bool(weight.table.isfinite().all()):
        return None
    absmax = weight.absmax.view(out_features, -1)
    scales: Tensor | NestedScales = absmax
    if weight.nested_table is not None and weight.nested_absmax is not None:
        size, offset = weight.nested_block_size, weight.nested_offset
        scales = NestedScales(absmax, weight.nested_table, weight.nested_absmax, size, offset)
    codes = weight.unpacked(0, out_features).view(weight.shape)
    return GroupedCodes(codes, scales, weight.block_size, 4, weight.table)


def _row_bytes(weight: RowBytes) -> GroupedCodes:
    scales = weight.largest[:, None]
    return GroupedCodes(weight.codes, scales, weight.shape[1], _WHOLE_BYTE, finish=Finish.TIMES, factor=INT8_STEP)


def _are_numbers(*tensors: Tensor) -> bool:
    """Return whether scales are of a dtype that products read, and none of the E4M3 floats is NaN."""
    for tensor in tensors:
        if tensor.dtype not in (*_SCALES, torch.int8):
            return False
        if tensor.dtype == torch.float8_e4m3fn and bool(((tensor.view(torch.uint8) & 127) == 127).any()):
            return False
    return True


_READERS: Mapping[type, Callable[[Any], GroupedCodes | None]] = MappingProxyType(
    {
        GroupedIntegers: _integers,
        ScaledFloats: _scaled_floats,
        Float4: _float4,
        Table4: _table4,
        RowBytes: _row_bytes,
    }
)
